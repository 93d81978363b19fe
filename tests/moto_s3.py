"""moto's server, with one write at a time, so that If-None-Match behaves as in S3.

moto itself first looks for the object and then writes it, so that two writers of one name may both succeed.
"""

import threading

from moto.s3.responses import S3Response
from moto.server import main

_put, _lock = S3Response._key_response_put, threading.Lock()


def _one_at_a_time(response: S3Response, query: dict, key_name: str):
    with _lock:
        return _put(response, query, key_name)


if __name__ == "__main__":
    S3Response._key_response_put = _one_at_a_time
    main()
