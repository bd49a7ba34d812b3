"""Public data sets as prompts: one loader for each format, and the first bad row is an error.

`load_prompts(DatasetConfig(format="advbench", path="harmful_behaviors.csv"))` gives
`spo.records.Prompt` rows, for Stage I sources and for evaluations alike.
"""

from spo.datasets.answers import CHECKS
from spo.datasets.load import load_prompts

__all__ = ["CHECKS", "load_prompts"]
