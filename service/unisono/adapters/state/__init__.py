"""What outlives the service, in files of its own."""
