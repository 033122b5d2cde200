import math

import pytest

from fastadv.ops._radius import check_radius


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [-0.5, -8, math.nan, -math.inf])
def test_a_radius_below_zero_is_in_no_other_unit(eps, norm):
    most = {"linf": "1.0", "l2": "inf"}[norm]
    with pytest.raises(ValueError, match=rf"^eps is .*, must be in \[0, {most}\]$"):
        check_radius(eps, norm, 0.0, 1.0)


def test_a_radius_above_the_box_may_be_in_another_unit():
    with pytest.raises(ValueError, match=r"^eps is 8, must be in \[0, 1.0\] .did you mean 8/255.."):
        check_radius(8, "linf", 0.0, 1.0)
    check_radius(8, "l2", 0.0, 1.0)
