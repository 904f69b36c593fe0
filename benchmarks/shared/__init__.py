"""What measurements have in common: small models and deployments, load, results, the machine they ran on."""
