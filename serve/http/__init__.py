"""The gateway: what comes in over HTTP and what goes out, and the checks in between."""
