"""Encrypted inference under CKKS: compile a network, a client with the key, a server with the model."""

from fedinfer.encrypted.circuit import PublicCircuit
from fedinfer.encrypted.client import EncryptedClient
from fedinfer.encrypted.compiled import Compiled
from fedinfer.encrypted.compiler import StatisticalFlooding, compile_model
from fedinfer.encrypted.engine import EncryptedEngine, EncryptedSession
from fedinfer.encrypted.explain import Explanation
from fedinfer.encrypted.finetune import finetune, polynomial_activations
from fedinfer.encrypted.key_store import load_keys, save_keys
from fedinfer.encrypted.serving import compile_served

__all__ = [
    "Compiled",
    "EncryptedClient",
    "EncryptedEngine",
    "EncryptedSession",
    "Explanation",
    "PublicCircuit",
    "StatisticalFlooding",
    "compile_model",
    "compile_served",
    "finetune",
    "load_keys",
    "polynomial_activations",
    "save_keys",
]
