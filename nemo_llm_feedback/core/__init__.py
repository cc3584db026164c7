"""The ground floor: errors, records, text, the prefix trie, run folders and settings. Imports torch at most."""
