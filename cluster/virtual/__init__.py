"""The service under virtual time: ``serve.policy`` decides as it does there, over gangs that compute nothing."""
