import pytest

from fastadv import models
from fastadv.errors import UsageError
from fastadv.runs.code import bring_in


@pytest.mark.parametrize("text", [".mine:net", "..:net", ":net", "mine:", "mine", None])
def test_text_of_another_form_is_refused(text):
    with pytest.raises(UsageError, match="--student-from is .*, must be module:function"):
        bring_in("--student-from", text, models.register)
