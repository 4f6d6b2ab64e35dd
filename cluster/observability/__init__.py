"""What operators see: recording and alert rules for Prometheus, and dashboards for Grafana, made by code."""
