"""The bundled chips, one YAML file each; `qcompile targets` lists them."""
