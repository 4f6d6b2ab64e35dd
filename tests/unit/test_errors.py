import pickle

import pytest

import pusa_dist.errors as errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickling_with_its_fields(cls):
    error = cls("message", "param", "code") if cls is errors.RequestError else cls("message")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert copy.args == error.args
    assert str(copy) == "message"
    assert vars(copy) == vars(error)
