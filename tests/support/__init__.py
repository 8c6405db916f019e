"""What tests share: processes, cached artefacts, the tiny recipes, stand-ins for servers."""
