"""OpenChatKit: turn a public base model into a chat model on the machines you have, and talk to it."""

__version__ = "1.0.0.dev0"
