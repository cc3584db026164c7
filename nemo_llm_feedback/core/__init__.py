"""What every other room may use: errors, records, text, the prefix trie, run folders and settings; torch at most."""
