"""Operating the service: its demonstration, measurements, scale, load and faults, and where it is deployed.

Meets the service through HTTP and its command line; of its code it takes the policy and the names of metrics.
"""
