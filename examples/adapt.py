"""The adapt job as a script, for those who keep their own copy: ``python examples/adapt.py KEY=VALUE …``.

It does what ``nemo-llm-feedback adapt`` does; ``--help`` explains the settings.
"""

import sys

from nemo_llm_feedback.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["adapt", *sys.argv[1:]]))
