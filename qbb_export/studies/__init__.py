"""Studies: small tables and curves that say how well a method does, as plain data that ``qbb report`` draws.

``RECORD/studies/<name>.json`` holds one :class:`Study` each.
"""

from __future__ import annotations

from qbb_export.studies.cost import cost_study
from qbb_export.studies.study import Series, Study
from qbb_export.studies.weights import weight_studies

__all__ = ["Series", "Study", "cost_study", "weight_studies"]
