"""The adapt job as a script, for those who keep their own copy: ``python examples/adapt.py KEY=VALUE …``.

It does what ``nemo-llm-feedback adapt`` does; the settings are explained by ``nemo-llm-feedback adapt --help``.
"""

import sys

from nemo_llm_feedback.adapt import adapt, summary
from nemo_llm_feedback.composition import compose_config

if __name__ == "__main__":
    print(summary(adapt(compose_config(sys.argv[1:]))))
