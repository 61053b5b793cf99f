"""What the suites measure: one module of workloads for each operator."""
