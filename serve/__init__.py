"""The service: Ray Serve deployments around the engine, behind the OpenAI Videos contract."""
