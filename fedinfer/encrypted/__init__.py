"""Encrypted inference under CKKS: compile a network, a client with the key, a server with the model."""

from fedinfer.encrypted.circuit import PublicCircuit
from fedinfer.encrypted.client import EncryptedClient
from fedinfer.encrypted.compiler import Compiled, StatisticalFlooding, compile_model
from fedinfer.encrypted.engine import EncryptedEngine, EncryptedSession
from fedinfer.encrypted.serving import compile_served

__all__ = [
    "Compiled",
    "EncryptedClient",
    "EncryptedEngine",
    "EncryptedSession",
    "PublicCircuit",
    "StatisticalFlooding",
    "compile_model",
    "compile_served",
]
