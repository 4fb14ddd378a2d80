"""Mixed precision: which layer's weights get which format. `qcompiler.search.search` is the road."""
