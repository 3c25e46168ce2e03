"""The bytes of the latest pictures."""

import threading
from collections import OrderedDict


class PictureMemory:
    """Keeps so many pictures, by the sha256 of their bytes, and forgets the oldest. May be used by several threads."""

    def __init__(self, most: int):
        self.most = most
        self._bytes: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, sha256: str, data: bytes) -> None:
        with self._lock:
            self._bytes[sha256] = data
            self._bytes.move_to_end(sha256)
            while len(self._bytes) > self.most:
                self._bytes.popitem(last=False)

    def get(self, sha256: str) -> bytes | None:
        with self._lock:
            return self._bytes.get(sha256)

    def __len__(self) -> int:
        return len(self._bytes)
