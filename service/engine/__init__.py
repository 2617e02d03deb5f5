"""The engine process: owns the device, schedules requests, runs the model."""
