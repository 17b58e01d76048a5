"""The forms of a layer at inference: `table` says what one is and knows them all, one family a file."""

from sparselth.sparse.forms.stage import Stage
from sparselth.sparse.forms.table import FORMS, Form, Formed, Made, fitting, register

__all__ = ["FORMS", "Form", "Formed", "Made", "Stage", "fitting", "register"]
