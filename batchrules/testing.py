"""Prove that foreign code is batched and differentiated right: checks for tests, and Hypothesis strategies.

Import it where it is used: `import batchrules.testing`. The strategies need Hypothesis: `pip install
'batchrules[testing]'`.
"""

from batchrules._testing_batching import check_batching
from batchrules._testing_register import check_register
from batchrules._testing_report import BatchDisagreement, Disagreement, Report
from batchrules._testing_strategies import arrays, axes, batches, in_axes, schemas

__all__ = [
    "BatchDisagreement",
    "Disagreement",
    "Report",
    "arrays",
    "axes",
    "batches",
    "check_batching",
    "check_register",
    "in_axes",
    "schemas",
]
