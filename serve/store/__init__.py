"""What survives a restart: jobs in SQL, inputs and results in the artifact store."""
