"""Operating the service: demonstration, measurements and, later, deployment and load.

Meets the service through HTTP and its command line only.
"""
