"""What the policies of the roles refuse; `test_pipeline.py` holds them against what a job asks for."""

import pytest

from tests.cluster.policies import refused, rights_of, unused


def test_no_worker_may_delete():
    assert "s3:DeleteObject" not in {action for action, _ in rights_of("worker")}


@pytest.mark.parametrize("role", ["driver", "worker"])
def test_a_request_that_no_right_covers_is_refused_and_a_right_that_no_request_needs_is_told(role):
    foreign = ("s3:PutObject", "example-images/one.png", "")
    read = ("s3:GetObject", "example-images/one.png", "")
    assert refused(role, {foreign, read}) == {foreign}
    assert unused(role, set()) == rights_of(role)
    assert rights_of(role) - unused(role, {read}) == {("s3:GetObject", "example-images/*")}
