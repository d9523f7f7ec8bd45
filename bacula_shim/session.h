/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * A job in bacula-fd and its conversations, one per command string, each with
 * a backend process of its own.  Functions returning bool return false after a
 * FATAL job message has been raised (or the job was cancelled): the caller only
 * has to hand an error to Bacula.
 */
#ifndef PH_SESSION_H
#define PH_SESSION_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "bacula_abi.h"
#include "child.h"
#include "ptcomm.h"

enum { LINE_SIZE = 8192 };

/* Set once in loadPlugin, constant afterwards. */
struct plugin {
    const struct dialect *dialect;
    const struct bacula_funcs *core;
    const char *backend;
    int idle_ms;   /* longest silence of a backend */
    int status_ms; /* longest wait for the answer to JobStatus */
};
extern struct plugin plugin;

struct restore_object {
    struct restore_object *next;
    char *command, *name, *data;
    uint32_t length, job_id;
    int type;
};

struct session;

struct job {
    struct bacula_ctx *ctx;
    pthread_mutex_t lock; /* guards `sessions` and their children against the cancel thread */
    atomic_bool cancelled;
    int wake; /* eventfd, readable once cancelled */
    struct session *sessions, *current;
    struct restore_object *objects, *last_object;
    char level;    /* 0 until told */
    int64_t since; /* 0: everything */
    char *name;    /* unique, known once a session started */
    int32_t next_object_index;
    bool failed; /* a FATAL message was raised by us */
    bool holds_restore_turn;
    bool cleaned; /* what an unclean end leaves is being undone */
};

enum kind { KIND_NONE, KIND_BACKUP, KIND_ESTIMATE, KIND_RESTORE };

enum entry { ENTRY_NONE, ENTRY_RESTORE_OBJECT, ENTRY_PLUGIN_CONFIG, ENTRY_FILE };

enum answer { ANSWER_EXTRACT, ANSWER_SKIP, ANSWER_CORE };

struct session {
    struct session *next;
    struct job *job;
    char *command;
    enum kind kind;
    struct child child;
    struct ptcomm pt;
    bool broken;    /* no more packets in either direction */
    bool confirmed; /* answered JobStatus=T or FINISH: may be sent END */
    bool clean;     /* said goodbye and ended */

    /* backup and estimate */
    bool peeked, no_more;   /* `line` holds the next entry's first command; F was seen */
    char line[LINE_SIZE];
    enum entry entry;
    char name[LINE_SIZE];   /* of the entry */
    char *object;           /* its bytes, for an object */
    uint32_t object_length; /* counted with its NUL for a plugin config */
    struct stat stat;
    bool offsets, has_data, at_end;
    int64_t position; /* next byte of the file, both directions */

    /* restore */
    enum answer answer;
    bool data_open, data_done;
    int64_t peer_position; /* where the backend expects the next byte */
};

/* -- job messages ----------------------------------------------------------- */

void say(struct job *job, int type, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* FATAL, unless the job was cancelled: then its status says so already.  Always false. */
bool fail(struct job *job, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A variable of the daemon, 0 if it has none. */
int number_value(struct job *job, int variable);

/* T, R, f, E, A... as the daemon sees it now. */
char job_status(struct job *job);

/* -- conversation ----------------------------------------------------------- */

struct session *session_find(const struct job *job, const char *command);
struct session *session_new(struct job *job, const char *command);
void session_free(struct session *s);

/* Start the backend and lead it up to BackupStart, EstimateStart or RestoreStart. */
bool session_start(struct session *s, enum kind kind);

/* Is there one more entry?  *more says so. */
bool session_peek(struct session *s, bool *more);

/* Read the next entry's description into s->entry, name, stat, object. */
bool session_entry(struct session *s);

/* Fill buffer as far as contiguous data goes; *length 0 is the end of the file. */
bool session_read(struct session *s, char *buffer, size_t size, size_t *length, int64_t *offset);

/* Forget the entry; its data must have been read to the end. */
bool session_entry_done(struct session *s);

/* Tell the job's status at the commit point and wait for the answer. */
bool session_job_status(struct session *s, char status);

bool session_restore_file(struct session *s, const struct restore_pkt *pkt);
bool session_write(struct session *s, const char *buffer, size_t length);
bool session_restore_file_done(struct session *s);
bool session_finish(struct session *s);

/* END, F, T; the backend is gone afterwards. */
void session_goodbye(struct session *s);

/* The other way out, in two steps so that several backends end together. */
void session_stop(struct session *s);
void session_reap(struct session *s);

#endif
