"""The one tree of errors.

    FedinferError
    ├── BadUsage                  an argument that cannot be right (exit code 2)
    ├── BadInput                  a file or a row that cannot be used (exit code 1)
    │   ├── SchemaError           the schema itself, or data that do not fit it
    │   ├── ModelFileError        a model file that is not one, or is for another schema
    │   └── CheckpointError       a checkpoint that is not one, or is for another run
    ├── ShapeMismatch             arrays that do not fit together
    ├── NonFinite                 NaN or infinity where a number is needed
    ├── PrivacyError
    │   ├── BudgetExceeded        the ledger refuses; nothing was released, nothing was spent
    │   ├── LedgerError           the ledger file is missing, corrupt or does not verify
    │   ├── UnprotectedRefused    a server asked for a release without a privacy plan
    │   └── ProtocolViolation     a message of a secure sum that no honest peer sends; nothing was revealed for it
    ├── WireError                 bytes that are not a message of ours
    │   ├── MessageTooLarge
    │   └── UnsupportedVersion
    ├── EncryptedError            a ciphertext, key set or circuit that does not fit
    │   └── CompileError          a network that no circuit computes, with the layer at fault
    ├── RemoteError               the other side answered with an error, or not at all
    └── RoundFailed               a round came to nothing: too few devices answered, or their sum is of no use

A message names what was got, what was expected and what to do. It never holds a secret, a feature or a decrypted value.
"""


class FedinferError(Exception):
    """Any error that this library raises on purpose."""

    exit_code = 1


class BadUsage(FedinferError):
    """An argument that cannot be right, whatever the data."""

    exit_code = 2


class BadInput(FedinferError):
    """A file or a row that cannot be used."""


class SchemaError(BadInput):
    """The schema is not valid, or the data do not fit it."""


class ModelFileError(BadInput):
    """The file is not a model of ours, or is for another schema."""


class CheckpointError(BadInput):
    """The file is not a checkpoint of ours, or belongs to another run."""


class ShapeMismatch(FedinferError):
    """Arrays that do not fit together."""

    def __init__(self, *, got: object, expected: object, what: str = "array") -> None:
        super().__init__(f"{what}: got shape {got}, expected {expected}")


class NonFinite(FedinferError):
    """NaN or infinity where a number is needed."""


class PrivacyError(FedinferError):
    """A privacy promise would not hold."""


class BudgetExceeded(PrivacyError):
    """The ledger refuses the release: nothing left the device and nothing was spent."""


class LedgerError(PrivacyError):
    """The ledger file is missing, corrupt or does not verify."""


class UnprotectedRefused(PrivacyError):
    """A release without a privacy plan was asked of a device that does not allow it."""


class ProtocolViolation(PrivacyError):
    """A message of a secure sum that no honest peer sends, or out of turn: nothing was revealed for it."""


class WireError(FedinferError):
    """Bytes that are not a message of ours."""


class MessageTooLarge(WireError):
    """The message is larger than its kind allows."""


class UnsupportedVersion(WireError):
    """The message is of another version of the format."""


class EncryptedError(FedinferError):
    """A ciphertext, a key set or a circuit that does not fit."""


class CompileError(EncryptedError):
    """A network that no circuit computes; the message names the layer."""


class RemoteError(FedinferError):
    """The other side answered with an error, or not at all."""


class RoundFailed(FedinferError):
    """A round came to nothing: too few devices answered, or their sum is of no use."""
