"""Values at rest: sealed under the App's keys, or plain without keys. Every stored value goes through here.

A sealed value is the JSON object `{"buquet.sealed": "<id of the key>.<base64>"}`, so it can stand wherever a value can. The
cipher, AES-256-SIV (RFC 5297), is deterministic: a value always seals to the same bytes within its task. So a repeated submit or
write has the same bytes, idempotency keys and payloads keep their hashes, and no nonce can be used twice. An observer learns only
whether two values of one task, in the same place, are equal.

`context` names the value and its owner, such as a task's id and "args". It is authenticated: a value that was moved to another
task, or from the arguments to the result, cannot be opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from typing import TYPE_CHECKING

import msgspec

from buquet.errors import EncryptionKeyMissing, InvalidArgument, UnreadableRecord, UsageError, install

if TYPE_CHECKING:
    from collections.abc import Iterable

    from msgspec import Raw

ENVIRONMENT = "BUQUET_ENCRYPTION_KEYS"
ONLY = "BUQUET_ENCRYPTED_ONLY"
"""The environment variable that refuses values which are not encrypted."""
HIDDEN = "(encrypted)"
"""Stands for an encrypted text that people would read."""
KEY_BYTES = 32
MARK = b'"buquet.sealed"'
"""The field that marks a sealed value. A user's value may not consist of this field alone."""


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sealed: str = msgspec.field(name="buquet.sealed")


def key_id_of(body: bytes | Raw) -> str:
    """Return the id of the key that a stored value is sealed under; empty for a plain value."""
    return _sealed(body).partition(".")[0]


def _sealed(body: bytes | Raw) -> str:
    """Return the contents of a sealed value; empty for a plain value."""
    if MARK not in bytes(body)[:40]:
        return ""
    try:
        return msgspec.json.decode(body, type=_Sealed).sealed
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


class Sealer:
    """Turns the JSON of a value into its stored form, and back. This one has no keys: it stores values plain."""

    key_id = ""
    """The public id of the key that seals; empty: values stay plain."""

    def can_open(self, key_id: str) -> bool:
        """Tell whether values sealed under this key can be opened here. Plain values have the empty id."""
        return not key_id

    def seal(self, body: bytes, context: str) -> bytes:
        """Return the stored form of a value. Raises InvalidArgument for a value that looks like a sealed one."""
        if _sealed(body):
            msg = (
                f"the value {context!r} has the one field {MARK.decode()}, which marks encrypted values. Name the field otherwise"
            )
            raise InvalidArgument(msg)
        return body

    def open(self, body: bytes | Raw, context: str) -> bytes | Raw:
        """Return the JSON of a stored value; a plain value is returned unchanged.

        Raises EncryptionKeyMissing, and UnreadableRecord for a value that was changed or moved.
        """
        sealed = _sealed(body)
        if not sealed and (self.can_open("") or not bytes(body)):
            return body
        if not sealed:
            msg = (
                f"the value {context!r} is not encrypted, and this App takes only encrypted values ({ONLY}). Its writer has no "
                "key: submit the task anew with the keys, or turn the mode off"
            )
            raise UnreadableRecord(msg)
        key_id, _, text = sealed.partition(".")
        return self._unseal(key_id, text, context)

    def _unseal(self, key_id: str, text: str, context: str) -> bytes:  # noqa: ARG002 - a subclass uses it
        raise _missing(key_id, context)


class Keyring(Sealer):
    """Seals with its first key, and opens with any of its keys. To rotate keys, put the new key first.

    `keys`: 32 bytes each, in base64. `only`: refuse values that are not sealed. Raises UsageError, which never shows a key.

    >>> ring = Keyring(["MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="])
    >>> bytes(ring.open(ring.seal(b"[1]", "a task"), "a task"))
    b'[1]'
    """

    def __init__(self, keys: Iterable[str], *, only: bool = False) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - optional, and slow to import
            from cryptography.hazmat.primitives.ciphers.aead import AESSIV  # noqa: PLC0415
        except ImportError:
            raise UsageError(f"encryption takes the package cryptography: {install('encryption')}") from None
        self._invalid: type[Exception] = InvalidTag
        self._ciphers: dict[str, AESSIV] = {}
        for number, text in enumerate(keys, start=1):
            key = _key(text, number)
            # the id of a key is public. The id and the cipher's key are both derived, so that neither reveals the other
            self._ciphers[_derived(key, "id")[:4].hex()] = AESSIV(_derived(key, "AES-256-SIV"))
        if not self._ciphers:
            msg = f"encryption needs a key at least: 32 random bytes in base64, as `openssl rand -base64 {KEY_BYTES}` prints them"
            raise UsageError(msg)
        self.key_id = next(iter(self._ciphers))
        self._only = only

    def __repr__(self) -> str:
        """Show the public ids."""
        return f"<buquet Keyring of {', '.join(self._ciphers)}>"

    def can_open(self, key_id: str) -> bool:
        """See Sealer."""
        return key_id in self._ciphers if key_id else not self._only

    def seal(self, body: bytes, context: str) -> bytes:
        """See Sealer."""
        text = base64.b64encode(self._ciphers[self.key_id].encrypt(body, [context.encode()])).decode()
        return msgspec.json.encode(_Sealed(f"{self.key_id}.{text}"))

    def _unseal(self, key_id: str, text: str, context: str) -> bytes:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise _missing(key_id, context)
        try:
            return cipher.decrypt(base64.b64decode(text, validate=True), [context.encode()])
        except (self._invalid, ValueError, binascii.Error):
            pass
        msg = f"the encrypted value {context!r} was changed, or belongs elsewhere. Restore an earlier version of the record"
        raise UnreadableRecord(msg)


def _missing(key_id: str, context: str) -> EncryptionKeyMissing:
    return EncryptionKeyMissing(
        f"the value {context!r} is encrypted under key {key_id[:20]!r}, which is not here. Put that key into {ENVIRONMENT}"
    )


def _key(text: str, number: int) -> bytes:
    try:
        key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise UsageError(f"encryption key {number} is not 32 bytes in base64: make one with `openssl rand -base64 {KEY_BYTES}`")
    return key


def _derived(key: bytes, what: str) -> bytes:
    return hmac.digest(key, f"buquet {what}".encode(), hashlib.sha512)


def sealer(keys: Iterable[str] | str | None, *, only: bool | None = None) -> Sealer:
    """Return the sealer for the `encryption` of an App. None: the keys of the environment, or none without any.

    `only` refuses plain values. None: BUQUET_ENCRYPTED_ONLY of the environment. Raises UsageError if it is on without keys.
    """
    text = os.environ.get(ENVIRONMENT, "") if keys is None else keys
    given = text.split(",") if isinstance(text, str) else text
    ring = [key for key in given if key.strip()]
    if only is None:
        only = _switched_on(os.environ.get(ONLY, ""))
    if ring:
        return Keyring(ring, only=only)
    if only:
        raise UsageError(f"an App that takes only encrypted values needs keys: set {ENVIRONMENT}, or pass encryption=[...]")
    return Sealer()


def _switched_on(text: str) -> bool:
    if text not in {"", "0", "1"}:
        raise UsageError(f"{ONLY} is 1 (on) or 0 (off), not {text[:20]!r}")
    return text == "1"
