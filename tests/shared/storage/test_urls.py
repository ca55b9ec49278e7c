"""URLs in messages: without what gives access."""

import pytest
from mapet.shared.storage.remote import without_query


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/x.tar?X-Amz-Signature=0123&a=b", "https://host/x.tar"),
        ("403, message='Forbidden', url='https://host/x.tar?X-Amz-Signature=0123'", None),
        ("s3://user:secret@bucket/x.tar", "s3://bucket/x.tar"),
        ("a::https://h/x.tar?sig=1", "a::https://h/x.tar"),
        ("data/train-?.tar", "data/train-?.tar"),
        ("https://host/x.tar", "https://host/x.tar"),
    ],
)
def test_a_url_is_shown_without_its_query_and_password(text: str, shown: str | None):
    assert without_query(text) == (shown or "403, message='Forbidden', url='https://host/x.tar'")
