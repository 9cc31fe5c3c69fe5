"""Encrypted inference under CKKS: a public circuit, a client with the key, a server with the model."""

from fedinfer.encrypted.circuit import PublicCircuit, public_circuit
from fedinfer.encrypted.client import EncryptedClient
from fedinfer.encrypted.engine import EncryptedEngine, EncryptedSession

__all__ = ["EncryptedClient", "EncryptedEngine", "EncryptedSession", "PublicCircuit", "public_circuit"]
