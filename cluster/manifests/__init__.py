"""Kubernetes manifests, judged without a cluster: rendered, then held against rules that no schema has."""
