"""A multiprocessing context whose processes start in milliseconds: a server has imported the libraries beforehand."""

import multiprocessing

context = multiprocessing.get_context("forkserver")
# The first test that needs the server starts it for all, so this is all that processes of any test import.
context.set_forkserver_preload(["torch", "transformers", "openchatkit.training.setup"])
