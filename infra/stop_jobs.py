"""Stop every job of the Ray cluster whose head this runs on, and wait until they have left with their checkpoints.

A head's preStop hook: a cluster that is deleted, suspended by Kueue or drained ends its jobs as `ray job stop` does.
How long a job may take is the head's RAY_JOB_STOP_WAIT_TIME_S.
"""

import time

from ray.job_submission import JobSubmissionClient


def main(address: str = "http://127.0.0.1:8265") -> None:
    client = JobSubmissionClient(address)
    running = {job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()}
    for job in running:
        print(f"stopping {job}", flush=True)
        client.stop_job(job)
    while running:
        time.sleep(1)
        running = {job for job in running if not client.get_job_status(job).is_terminal()}


if __name__ == "__main__":
    main()
