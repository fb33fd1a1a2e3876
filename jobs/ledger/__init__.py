"""The ledger of a job: receipts, dead letters, markers and requests in the bucket, reconciled with the plan."""
