"""fedinfer: data stays on the device; models travel, noise is counted, a question is asked without being seen."""

__version__ = "0.1.0"
