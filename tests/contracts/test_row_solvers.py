"""Every row solver against the contract."""
