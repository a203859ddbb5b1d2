"""A store that loses races, for the tests that must find this out."""

from buquet.errors import AlreadyExists, Changed
from buquet.store.base import NOT_MODIFIED, PassingStore


class TornStore(PassingStore):
    """A store whose conditional writes are not atomic, as on some S3 look-alikes: `buquet doctor` must find out."""

    def __init__(self, inner, clock):
        super().__init__(inner)
        self.clock = clock

    async def create(self, key, body):
        if await self.inner.get(key) is not None:
            raise AlreadyExists(f"{key} exists")
        await self.clock.sleep(0)
        return await self.inner.put(key, body)

    async def update(self, key, body, etag):
        if await self.inner.get(key, unless=etag) is not NOT_MODIFIED:
            raise Changed(f"{key} is no longer the version read")
        await self.clock.sleep(0)
        return await self.inner.put(key, body)
