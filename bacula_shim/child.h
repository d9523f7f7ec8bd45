/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The backend as a process: started, signalled, ended and reaped. */
#ifndef PH_CHILD_H
#define PH_CHILD_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct child {
    pthread_mutex_t *lock; /* guards pid: another thread may signal while we reap */
    pid_t pid;             /* 0: none, or reaped */
    int to, from;          /* our ends of its stdin and stdout, non-blocking; -1: closed */
    bool ended;            /* reaped; status is valid unless lost */
    bool lost;             /* somebody else reaped it */
    int status;            /* as from waitpid */
};

void child_init(struct child *child, pthread_mutex_t *lock);

/*
 * Start `path` without arguments in its own process group, with pipes as stdin
 * and stdout, stderr on /dev/null and every other descriptor closed.  Returns 0
 * or an errno value, also that of a failed exec.
 */
int child_start(struct child *child, const char *path);

/*
 * Reap it if it has ended; wait up to timeout_ms for that.  `sweep` kills what is
 * left of its process group first.  Returns true when it is gone.
 */
bool child_wait(struct child *child, int timeout_ms, bool sweep);

/* Send a signal to the whole process group, unless it is reaped.  Any thread. */
void child_signal(struct child *child, int signal_number);

/* Close our ends of the pipes. */
void child_close(struct child *child);

/* "exit status 1", "killed by signal 9", "still running". */
void child_describe(const struct child *child, char *text, size_t size);

/*
 * Start `path argument1 argument2` in a session of its own and as nobody's child,
 * with /dev/null as stdio.  Returns 0 or an errno value.
 */
int child_detached(const char *path, const char *argument1, const char *argument2);

#endif
