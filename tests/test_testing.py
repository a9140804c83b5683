"""What `archdsl.testing` says where it is asked for a kind that there is not."""

from __future__ import annotations

import pytest

from archdsl.testing import checks, contract


@pytest.mark.parametrize("call", [contract, checks])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("nosuch",), r"^unknown kind 'nosuch'; known kinds: add, all, attention, .*top_k\. "),
        (("nosuch",), r"known once its module is imported: import it in the test, or set ARCHDSL_"),
        (("lop",), r"^unknown kind 'lop' \(did you mean 'loop'\?\); known kinds: "),
        ((3,), r"^unknown kind 3; known kinds: "),
        (("loop", "router"), r"^unknown kind 'loop' of router; known kinds: all, predictor, "),
        (("top_k", "routr"), r"^unknown family 'routr' \(did you mean 'router'\?\); known famili"),
    ],
)
def test_an_unknown_kind_is_told_those_there_are(call, given, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(*given)
