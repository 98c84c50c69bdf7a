"""What can go wrong, by what to do about it.

    DicomscpError
    ├── RefusedError      the object will never be taken: do not resend
    │   ├── MismatchError        it is not what its sender claimed
    │   ├── CrowdedError         as many variants of it are held as may be
    │   ├── LimitError           it is larger, or has more in it, than is taken
    │   └── TransferSyntaxError  it is encoded as nothing can be held here
    ├── BusyError         not now: resend later
    ├── RemovedError      it was removed while it was asked for: nothing to do
    ├── UnreachableError  a peer is away: we retry
    ├── DamagedError      what we hold is not as we left it: a person must look
    └── ConfigError       the settings are wrong: exit status 2

Each edge holds one table from these to its own status.
"""


class DicomscpError(Exception):
    """Anything this program raises on purpose; the message is a sentence a person can act on."""


class RefusedError(DicomscpError):
    """The object cannot be taken, now or later."""


class MismatchError(RefusedError):
    """The dataset is not the SOP instance that its sender claimed."""


class CrowdedError(RefusedError):
    """As many variants are held of the instance as may be; a person must remove one first."""


class LimitError(RefusedError):
    """The object is larger, or has more in it, than is taken."""


class TransferSyntaxError(RefusedError):
    """The object's transfer syntax is none that instances are held in."""


class BusyError(DicomscpError):
    """A resource is short; the same request may succeed later."""


class RemovedError(DicomscpError):
    """What is asked for has been removed meanwhile."""


class UnreachableError(DicomscpError):
    """A peer does not answer; the request is tried again."""


class DamagedError(DicomscpError):
    """Something held is missing or changed; a person must look."""


class ConfigError(DicomscpError):
    """The settings cannot be used."""
