/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * Bacula File Daemon plug-in: hands Bacula's callbacks to a backend process over
 * two pipes, and nothing else.  README.md tells the story; bacula_abi.h holds the
 * daemon's side of the interface, session.c the conversation with the backend.
 *
 * The rule behind every error path: bacula-fd ends a job "OK" although a callback
 * returned an error, unless a FATAL job message was raised before.
 *
 * Threads: one context per job, many jobs at once; all callbacks of a job come
 * from its own thread except EV_CANCEL_COMMAND.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "session.h"

#ifndef BACKEND_PATH
#define BACKEND_PATH "/usr/bin/podheitor-proxmox-backend"
#endif
#ifndef SHIM_VERSION
#define SHIM_VERSION "0.1.0"
#endif

#define OUR_NAMES "/@proxmox/"

/* Bacula chooses a plug-in by its file's name.  A copy named after a sister plug-in that is not
 * installed gets the restores of that one's jobs, and must refuse all else. */
#ifndef OWN_COMMANDS
#define OWN_COMMANDS "podheitor-proxmox:"
#endif

enum { DEFAULT_IDLE_S = 3600, DEFAULT_STATUS_S = 600, MAX_S = 2000000 };

static const struct dialect dialects[] = {
    { .interface = IFACE_9_6, .funcs_size = 128, .save_size = 240,
      .fatal = 3, .error = 4, .warning = 5, .info = 6, .saved = 7, .notsaved = 8, .skipped = 9,
      .mount = 10, .restored = 13,
      .var_where = 14, .var_regex_where = 15, .var_exe_path = 16, .var_prev_job = 20,
      .var_file_index = 23, .var_replace = 24, .one_restore_at_a_time = true },
    { .interface = IFACE_11_0, .funcs_size = 144, .save_size = 256,
      .fatal = 3, .error = 4, .warning = 5, .info = 6, .saved = 7, .notsaved = 8, .skipped = 9,
      .mount = 10, .restored = 13,
      .var_where = 14, .var_regex_where = 15, .var_exe_path = 16, .var_prev_job = 19,
      .var_file_index = 22, .var_replace = 23, .one_restore_at_a_time = true },
    { .interface = IFACE_15_0, .funcs_size = 168, .save_size = 344,
      .fatal = 4, .error = 5, .warning = 6, .info = 7, .saved = 8, .notsaved = 9, .skipped = 10,
      .mount = 11, .restored = 14,
      .var_where = 15, .var_regex_where = 16, .var_exe_path = 17, .var_prev_job = 20,
      .var_file_index = 23, .var_replace = 24, .one_restore_at_a_time = false },
};

struct plugin plugin; /* written in loadPlugin only */

/* -- one restore at a time where the daemon needs it ------------------------ */

/* Up to 11.0 the daemon keeps "a file is being restored" per plug-in, not per job, and fails
 * the job that finds it set.  Whoever restores holds the turn from StartRestoreJob on. */
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_given = PTHREAD_COND_INITIALIZER;
static bool turn_taken;

static bool take_restore_turn(struct job *job)
{
    if (!plugin.dialect->one_restore_at_a_time || job->holds_restore_turn)
        return true;
    int64_t until = pt_now_ms() + plugin.idle_ms;
    bool told = false;
    pthread_mutex_lock(&turn_lock);
    while (turn_taken && !atomic_load(&job->cancelled) && pt_now_ms() < until) {
        if (!told) {
            pthread_mutex_unlock(&turn_lock);
            say(job, plugin.dialect->info, "waiting for another restore in this File Daemon.");
            told = true;
            pthread_mutex_lock(&turn_lock);
            continue;
        }
        struct timespec soon; /* a second: the cancel flag is looked at in between */
        clock_gettime(CLOCK_REALTIME, &soon);
        soon.tv_sec++;
        pthread_cond_timedwait(&turn_given, &turn_lock, &soon);
    }
    if (!turn_taken && !atomic_load(&job->cancelled))
        turn_taken = job->holds_restore_turn = true;
    pthread_mutex_unlock(&turn_lock);
    return job->holds_restore_turn
           || fail(job, "another restore kept this File Daemon busy; run this one again later.");
}

static void give_restore_turn(struct job *job)
{
    if (!job->holds_restore_turn)
        return;
    pthread_mutex_lock(&turn_lock);
    job->holds_restore_turn = turn_taken = false;
    pthread_cond_broadcast(&turn_given);
    pthread_mutex_unlock(&turn_lock);
}

/* -- job -------------------------------------------------------------------- */

/* Keeps a job alive while another thread cancels it. */
static pthread_mutex_t contexts = PTHREAD_MUTEX_INITIALIZER;

static struct job *job_of(struct bacula_ctx *ctx)
{
    return ctx != NULL ? ctx->ours : NULL;
}

static int new_plugin(struct bacula_ctx *ctx)
{
    /* Also called for every console connection: nothing heavy here.  Without memory the
     * context stays empty, which the first command reports. */
    struct job *job = calloc(1, sizeof *job);
    ctx->ours = job;
    if (job == NULL)
        return RC_OK;
    job->ctx = ctx;
    job->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&job->lock, NULL);
    atomic_init(&job->cancelled, false);
    return RC_OK;
}

static void clean_up_after(struct job *job)
{
    if (job->cleaned)
        return;
    job->cleaned = true;
    int error = child_detached(plugin.backend, "--cleanup", job->name);
    if (error != 0)
        say(job, plugin.dialect->warning,
            "could not start \"%s --cleanup %s\": %s. Run it by hand on the node.", plugin.backend,
            job->name, strerror(error));
}

/* End every backend that has not said goodbye; afterwards none of them is left. */
static void end_sessions(struct job *job)
{
    bool unclean = false;
    for (struct session *s = job->sessions; s != NULL; s = s->next) {
        if (s->kind == KIND_NONE || s->clean)
            continue;
        session_stop(s);
        /* An estimate changes nothing; nor did a backend that could not be started. */
        bool ran = s->child.pid > 0 || s->child.ended;
        unclean = unclean || (ran && s->kind != KIND_ESTIMATE);
    }
    for (struct session *s = job->sessions; s != NULL; s = s->next)
        if (s->kind != KIND_NONE && !s->clean)
            session_reap(s);
    if (unclean && job->name != NULL)
        clean_up_after(job);
}

static int free_plugin(struct bacula_ctx *ctx)
{
    struct job *job = job_of(ctx);
    if (job == NULL)
        return RC_OK;
    end_sessions(job);
    give_restore_turn(job);
    pthread_mutex_lock(&contexts);
    ctx->ours = NULL;
    pthread_mutex_unlock(&contexts);
    while (job->sessions != NULL) {
        struct session *next = job->sessions->next;
        session_free(job->sessions);
        job->sessions = next;
    }
    while (job->objects != NULL) {
        struct restore_object *next = job->objects->next;
        free(job->objects->command);
        free(job->objects->name);
        free(job->objects->data);
        free(job->objects);
        job->objects = next;
    }
    if (job->wake >= 0)
        close(job->wake);
    pthread_mutex_destroy(&job->lock);
    free(job->name);
    free(job);
    return RC_OK;
}

/* -- events ----------------------------------------------------------------- */

/* On the console's thread, while the job's own may be waiting for the backend. */
static void cancel(struct bacula_ctx *ctx)
{
    static const uint64_t one = 1;
    pthread_mutex_lock(&contexts);
    struct job *job = job_of(ctx);
    if (job != NULL) {
        pthread_mutex_lock(&job->lock);
        atomic_store(&job->cancelled, true);
        struct session *sessions = job->sessions;
        pthread_mutex_unlock(&job->lock);
        if (job->wake >= 0 && write(job->wake, &one, sizeof one) < 0) {
            /* the counter is full: it is readable already */
        }
        for (struct session *s = sessions; s != NULL; s = s->next)
            child_signal(&s->child, SIGUSR1);
    }
    pthread_mutex_unlock(&contexts);
}

/* Remember a restore object until the backend of its command runs. */
static bool keep_object(struct job *job, const struct restore_object_pkt *pkt)
{
    if (pkt->pkt_size != sizeof *pkt || pkt->pkt_end != sizeof *pkt)
        return fail(job, "unexpected layout of a restore object packet (%d bytes).", pkt->pkt_size);
    if (pkt->object_type != FT_RESTORE_FIRST && pkt->object_type != FT_PLUGIN_CONFIG
        && pkt->object_type != FT_PLUGIN_CONFIG_FILLED)
        return true;
    if (pkt->object_len < 0 || (pkt->object_len > 0 && pkt->object == NULL))
        return fail(job, "restore object with a length of %d.", pkt->object_len);
    if (pkt->object_type == FT_PLUGIN_CONFIG_FILLED && pkt->object_len > 0
        && pkt->object[0] == '\0')
        return fail(job, "the options set in bconsole came back unreadable: Bacula 9.6 with SQLite "
                         "loses texts of some lengths. Make one value a character longer, or pass "
                         "the options as where=/@pve/key=value.");
    struct restore_object *object = calloc(1, sizeof *object);
    if (object == NULL)
        return fail(job, "out of memory for a restore object.");
    object->command = strdup(pkt->plugin_name != NULL ? pkt->plugin_name : "");
    object->name = strdup(pkt->object_name != NULL ? pkt->object_name : "");
    object->data = malloc((size_t)pkt->object_len + 1);
    object->length = (uint32_t)pkt->object_len;
    object->job_id = pkt->job_id;
    object->type = pkt->object_type;
    /* In the list first: free_plugin owns it from here on, whole or not. */
    if (job->last_object != NULL)
        job->last_object->next = object;
    else
        job->objects = object;
    job->last_object = object;
    if (object->command == NULL || object->name == NULL || object->data == NULL)
        return fail(job, "out of memory for a restore object.");
    if (strchr(object->name, '\n') != NULL)
        return fail(job, "restore object with a line break in its name.");
    memcpy(object->data, pkt->object, object->length);
    return true;
}

static bool restores_only(struct job *job, const char *command)
{
    if (strncmp(command, OWN_COMMANDS, strlen(OWN_COMMANDS)) == 0)
        return false;
    fail(job, "this is no plug-in that backs up \"%.*s\": it is pveplug's copy under that name, "
              "which only restores. Install the sister plug-in in its place for backups.",
         (int)strcspn(command, ":"), command);
    return true;
}

static bool announced(struct job *job, const char *command)
{
    if (restores_only(job, command))
        return false;
    if (session_find(job, command) != NULL)
        return fail(job, "the same Plugin line stands twice in the FileSet: %.300s", command);
    return session_new(job, command) != NULL;
}

static bool start(struct job *job, const char *command, enum kind kind)
{
    if (kind != KIND_RESTORE && !job->failed && restores_only(job, command))
        return false;
    struct session *s = session_find(job, command);
    job->current = s;
    /* A job that failed before (an earlier line, a refused one) must not touch more VMs. */
    if (job->failed || atomic_load(&job->cancelled))
        return false;
    if (s == NULL)
        s = job->current = session_new(job, command);
    return s != NULL && session_start(s, kind);
}

/* That of the newest job: an older one may hold a credential which is no longer good. */
static const char *newest_command(const struct job *job, const char *command)
{
    uint32_t newest = 0;
    for (const struct restore_object *o = job->objects; o != NULL; o = o->next)
        if (o->type != FT_PLUGIN_CONFIG_FILLED && o->command[0] != '\0' && o->job_id > newest) {
            newest = o->job_id;
            command = o->command;
        }
    return command;
}

/* One session restores everything.  Bacula calls with the command string of each job, and a
 * chain is still one chain when the string was edited between its jobs. */
static struct session *restore_session(const struct job *job)
{
    struct session *s = job->sessions;
    while (s != NULL && s->kind != KIND_RESTORE)
        s = s->next;
    return s;
}

static bool restore_command(struct job *job, const char *command)
{
    struct session *s = restore_session(job);
    if (s != NULL) {
        job->current = s;
        return true;
    }
    return take_restore_turn(job) && start(job, newest_command(job, command), KIND_RESTORE);
}

/* The storage daemon has everything; a FATAL message is still heard. */
static bool end_backup_job(struct job *job)
{
    bool ok = true;
    for (struct session *s = job->sessions; s != NULL; s = s->next) {
        if (s->kind != KIND_BACKUP || atomic_load(&job->cancelled))
            continue;
        /* Asked anew each time: the previous backend may just have failed the job. */
        char status = job_status(job);
        if (status == 'T' && !s->broken && !s->no_more)
            ok = fail(job, "the File Daemon ended the backup before the backend did.");
        else
            ok = session_job_status(s, job->failed && status == 'T' ? 'f' : status) && ok;
    }
    return ok;
}

static bool end_restore_job(struct job *job)
{
    bool ok = true;
    for (struct session *s = job->sessions; s != NULL && ok; s = s->next) {
        if (s->kind != KIND_RESTORE)
            continue;
        char status = job_status(job);
        /* FINISH makes a VM out of what was written: never after a failure. */
        if (job->failed || atomic_load(&job->cancelled) || strchr("AEf", status) != NULL)
            ok = false;
        else
            ok = session_finish(s);
    }
    return ok;
}

static void job_end(struct job *job)
{
    for (struct session *s = job->sessions; s != NULL; s = s->next)
        if (!s->broken && (s->confirmed || (s->kind == KIND_ESTIMATE && s->no_more)))
            session_goodbye(s);
}

static int handle_event(struct bacula_ctx *ctx, struct bacula_event *event, void *value)
{
    if (event->type == EV_CANCEL_COMMAND) {
        cancel(ctx);
        return RC_OK;
    }
    struct job *job = job_of(ctx);
    bool ok = true;
    if (job == NULL) {
        if (event->type == EV_PLUGIN_COMMAND || event->type == EV_BACKUP_COMMAND
            || event->type == EV_ESTIMATE_COMMAND || event->type == EV_RESTORE_COMMAND) {
            plugin.core->job_message(ctx, "podheitor-proxmox", 0, plugin.dialect->fatal, 0,
                                     "podheitor-proxmox: out of memory.\n");
            return RC_ERROR;
        }
        return RC_OK;
    }
    switch (event->type) {
    case EV_LEVEL:
        job->level = (char)(intptr_t)value;
        break;
    case EV_SINCE:
        job->since = (int64_t)(intptr_t)value;
        break;
    case EV_PLUGIN_COMMAND:
        ok = announced(job, value);
        break;
    case EV_BACKUP_COMMAND:
        ok = start(job, value, KIND_BACKUP);
        break;
    case EV_ESTIMATE_COMMAND:
        ok = start(job, value, KIND_ESTIMATE);
        break;
    case EV_RESTORE_OBJECT:
        if (value != NULL)
            ok = keep_object(job, value);
        break;
    case EV_START_RESTORE_JOB:
        /* Every plug-in gets this for every restore; our jobs always have an object. */
        if (job->objects != NULL)
            ok = take_restore_turn(job);
        break;
    case EV_RESTORE_COMMAND:
        /* Not an error even if it failed: the core would write the raw stream into a file of its
         * own.  create_file refuses each file instead. */
        restore_command(job, value);
        break;
    case EV_END_BACKUP_JOB:
        ok = end_backup_job(job);
        break;
    case EV_END_RESTORE_JOB:
        ok = end_restore_job(job);
        give_restore_turn(job);
        break;
    case EV_JOB_END:
        job_end(job);
        break;
    default:
        break;
    }
    return ok ? RC_OK : RC_ERROR;
}

/* -- backup ----------------------------------------------------------------- */

/* Calls of a job without a conversation: a bug of the daemon, or nothing was started. */
static struct session *current(struct bacula_ctx *ctx)
{
    struct job *job = job_of(ctx);
    if (job == NULL)
        return NULL;
    if (job->current == NULL && !job->failed)
        fail(job, "called by the File Daemon without a command.");
    return job->current;
}

/* The fields of save_pkt have a place of their own in each interface. */
#define FILL_FILE(pkt, s)                                                                          \
    do {                                                                                           \
        (pkt)->fname = (pkt)->link = (s)->name;                                                    \
        (pkt)->statp = (s)->stat;                                                                  \
        (pkt)->type = S_ISDIR((s)->stat.st_mode) ? FT_DIREND : FT_REG;                             \
        (pkt)->flags |= (s)->offsets ? FO_OFFSETS : 0;                                             \
        (pkt)->no_read = !(s)->has_data;                                                           \
    } while (0)

#define FILL_OBJECT(pkt, s)                                                                        \
    do {                                                                                           \
        (pkt)->fname = (pkt)->link = (pkt)->object_name = (s)->name;                               \
        (pkt)->type = (s)->entry == ENTRY_PLUGIN_CONFIG ? FT_PLUGIN_CONFIG : FT_RESTORE_FIRST;     \
        (pkt)->object = (s)->object;                                                               \
        (pkt)->object_len = (int32_t)(s)->object_length;                                           \
        (pkt)->index = ++(s)->job->next_object_index;                                              \
    } while (0)

#define FILL(pkt, s)                                                                               \
    do {                                                                                           \
        if ((s)->entry == ENTRY_FILE)                                                              \
            FILL_FILE(pkt, s);                                                                     \
        else                                                                                       \
            FILL_OBJECT(pkt, s);                                                                   \
    } while (0)

static bool save_pkt_fits(struct job *job, const void *pkt)
{
    int32_t size = 0, end = 0, expected = plugin.dialect->save_size;
    size_t end_at = plugin.dialect->interface == IFACE_9_6    ? offsetof(struct save_pkt_14, pkt_end)
                    : plugin.dialect->interface == IFACE_11_0 ? offsetof(struct save_pkt_21, pkt_end)
                                                              : offsetof(struct save_pkt_23, pkt_end);
    memcpy(&size, pkt, sizeof size);
    if (size == expected)
        memcpy(&end, (const char *)pkt + end_at, sizeof end);
    return (size == expected && end == expected)
           || fail(job, "unexpected layout of a save packet (%d bytes, not %d).", size, expected);
}

static int start_backup_file(struct bacula_ctx *ctx, void *pkt)
{
    struct session *s = current(ctx);
    bool more;
    if (s == NULL || !save_pkt_fits(s->job, pkt) || !session_peek(s, &more))
        return RC_ERROR;
    if (!more) {
        say(s->job, plugin.dialect->warning, "the backend had nothing to back up.");
        return RC_STOP;
    }
    if (!session_entry(s))
        return RC_ERROR;
    switch (plugin.dialect->interface) {
    case IFACE_9_6:
        FILL((struct save_pkt_14 *)pkt, s);
        break;
    case IFACE_11_0:
        FILL((struct save_pkt_21 *)pkt, s);
        break;
    default:
        FILL((struct save_pkt_23 *)pkt, s);
        break;
    }
    return RC_OK;
}

static int end_backup_file(struct bacula_ctx *ctx)
{
    struct session *s = current(ctx);
    bool more;
    if (s == NULL || !session_entry_done(s) || !session_peek(s, &more))
        return RC_ERROR;
    return more ? RC_MORE : RC_OK;
}

/* -- restore ---------------------------------------------------------------- */

static int start_restore_file(struct bacula_ctx *ctx, const char *command)
{
    struct job *job = job_of(ctx);
    (void)command;
    if (job != NULL)
        job->current = restore_session(job);
    return RC_OK; /* see EV_RESTORE_COMMAND */
}

static bool restore_pkt_fits(struct job *job, const struct restore_pkt *pkt)
{
    return (pkt->pkt_size == sizeof *pkt && pkt->pkt_end == sizeof *pkt)
           || fail(job, "unexpected layout of a restore packet (%d bytes).", pkt->pkt_size);
}

static int create_file(struct bacula_ctx *ctx, struct restore_pkt *pkt)
{
    static const int32_t status[] = { [ANSWER_EXTRACT] = CF_EXTRACT, [ANSWER_SKIP] = CF_SKIP,
                                      [ANSWER_CORE] = CF_CORE };
    struct session *s = current(ctx);
    if (s == NULL || !restore_pkt_fits(s->job, pkt) || !session_restore_file(s, pkt)) {
        pkt->create_status = CF_ERROR;
        return RC_ERROR;
    }
    pkt->create_status = status[s->answer];
    return RC_OK;
}

static int set_file_attributes(struct bacula_ctx *ctx, struct restore_pkt *pkt)
{
    struct session *s = current(ctx);
    if (s == NULL || !restore_pkt_fits(s->job, pkt))
        return RC_ERROR;
    /* Asks the core to set owner, mode and times of the file that it wrote itself. */
    if (s->answer == ANSWER_CORE)
        pkt->create_status = CF_CORE;
    return RC_OK;
}

static int end_restore_file(struct bacula_ctx *ctx)
{
    struct job *job = job_of(ctx);
    struct session *s = job != NULL ? job->current : NULL;
    /* A file without data may come without IO_OPEN and IO_CLOSE. */
    return s == NULL || session_restore_file_done(s) ? RC_OK : RC_ERROR;
}

/* -- data ------------------------------------------------------------------- */

static bool transfer(struct session *s, struct io_pkt *io)
{
    size_t length;
    bool restore = s->kind == KIND_RESTORE;
    switch (io->func) {
    case IO_OPEN:
        return !s->broken;
    case IO_READ:
        if (restore || io->count <= 0 || io->buf == NULL)
            return fail(s->job, "read request of %d bytes.", io->count);
        if (!session_read(s, io->buf, (size_t)io->count, &length, &io->offset))
            return false;
        io->status = (int32_t)length;
        return true;
    case IO_WRITE:
        if (!restore || io->count < 0 || (io->count > 0 && io->buf == NULL))
            return fail(s->job, "write request of %d bytes.", io->count);
        if (!session_write(s, io->buf, (size_t)io->count))
            return false;
        io->status = io->count;
        return true;
    case IO_SEEK:
        if (!restore || io->whence != SEEK_SET || io->offset < 0)
            return fail(s->job, "seek to %lld by %d.", (long long)io->offset, io->whence);
        s->position = io->offset;
        return true;
    case IO_CLOSE:
        return !restore || session_restore_file_done(s);
    default:
        return fail(s->job, "unknown I/O function %d.", io->func);
    }
}

static int plugin_io(struct bacula_ctx *ctx, struct io_pkt *io)
{
    struct session *s = current(ctx);
    io->status = 0;
    io->io_errno = 0;
    if (s != NULL && io->pkt_size == sizeof *io && io->pkt_end == sizeof *io) {
        if (transfer(s, io))
            return RC_OK;
        /* Not at the job's end: while much of the file is still to come, the daemon waits two
         * minutes for its peers before it frees us. */
        if (s->kind == KIND_RESTORE && s->child.ended && s->job->name != NULL)
            clean_up_after(s->job);
    } else if (s != NULL) {
        fail(s->job, "unexpected layout of an I/O packet (%d bytes).", io->pkt_size);
    }
    io->status = -1;
    io->io_errno = EIO;
    return RC_ERROR;
}

/* -- the rest --------------------------------------------------------------- */

static int check_file(struct bacula_ctx *ctx, char *name)
{
    struct job *job = job_of(ctx);
    /* An accurate job records as deleted whatever nobody has seen; the members of a chain have
     * job-specific names and must not vanish from it. */
    if (job != NULL && job->sessions != NULL && strncmp(name, OUR_NAMES, strlen(OUR_NAMES)) == 0)
        return RC_SEEN;
    return RC_OK;
}

static int handle_xacl(struct bacula_ctx *ctx, struct xacl_pkt *pkt)
{
    (void)ctx;
    pkt->count = 0; /* our files have neither ACL nor extended attributes */
    return RC_OK;
}

static int no_value(struct bacula_ctx *ctx, int variable, void *value)
{
    (void)ctx;
    (void)variable;
    (void)value;
    return RC_OK;
}

static struct plugin_info info = {
    .size = sizeof info,
    .magic = "*FDPluginData*",
    .license = "AGPLv3",
    .author = "pveplug contributors",
    .date = "2026",
    .plugin_version = SHIM_VERSION,
    .description = "Proxmox VE virtual machines (AGPL-3.0-or-later)",
};

static struct plugin_funcs funcs = {
    .new_plugin = new_plugin,
    .free_plugin = free_plugin,
    .get_value = no_value,
    .set_value = no_value,
    .handle_event = handle_event,
    .start_backup_file = start_backup_file,
    .end_backup_file = end_backup_file,
    .start_restore_file = start_restore_file,
    .end_restore_file = end_restore_file,
    .plugin_io = plugin_io,
    .create_file = create_file,
    .set_file_attributes = set_file_attributes,
    .check_file = check_file,
    .handle_xacl = handle_xacl,
};

static int seconds_from(const char *variable, int default_s)
{
    const char *text = getenv(variable);
    char *end;
    if (text == NULL)
        return default_s * 1000;
    long value = strtol(text, &end, 10);
    return end != text && *end == '\0' && value > 0 && value <= MAX_S ? (int)value * 1000
                                                                      : default_s * 1000;
}

#define EXPORTED __attribute__((visibility("default")))

EXPORTED int loadPlugin(struct bacula_info *binfo, struct bacula_funcs *bfuncs,
                        struct plugin_info **pinfo, struct plugin_funcs **pfuncs);
EXPORTED int unloadPlugin(void);

EXPORTED int loadPlugin(struct bacula_info *binfo, struct bacula_funcs *bfuncs,
                        struct plugin_info **pinfo, struct plugin_funcs **pfuncs)
{
    const char *backend = getenv("PODHEITOR_PROXMOX_BACKEND");
    plugin.dialect = NULL;
    for (size_t i = 0; i < sizeof dialects / sizeof dialects[0]; i++)
        if (dialects[i].interface == bfuncs->version && dialects[i].interface == binfo->version)
            plugin.dialect = &dialects[i];
    if (plugin.dialect == NULL)
        return RC_ERROR; /* an interface whose layouts we do not know */
    plugin.core = bfuncs;
    plugin.backend = strdup(backend != NULL && backend[0] != '\0' ? backend : BACKEND_PATH);
    if (plugin.backend == NULL)
        return RC_ERROR;
    plugin.idle_ms = seconds_from("PODHEITOR_PROXMOX_TIMEOUT", DEFAULT_IDLE_S);
    plugin.status_ms = seconds_from("PODHEITOR_PROXMOX_STATUS_TIMEOUT", DEFAULT_STATUS_S);
    info.version = funcs.version = bfuncs->version;
    funcs.size = plugin.dialect->funcs_size;
    *pinfo = &info;
    *pfuncs = &funcs;
    return RC_OK;
}

EXPORTED int unloadPlugin(void)
{
    free((char *)plugin.backend);
    plugin.backend = NULL;
    return RC_OK;
}
