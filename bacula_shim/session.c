/* SPDX-License-Identifier: AGPL-3.0-or-later */
#define _GNU_SOURCE
#include "session.h"

#include <ctype.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "talk.h"

enum { GOODBYE_MS = 10000, TERM_MS = 10000, KILL_MS = 5000 };

/* -- start ------------------------------------------------------------------ */

struct session *session_find(const struct job *job, const char *command)
{
    for (struct session *s = job->sessions; s != NULL; s = s->next)
        if (strcmp(s->command, command) == 0)
            return s;
    return NULL;
}

struct session *session_new(struct job *job, const char *command)
{
    struct session *s = calloc(1, sizeof *s);
    char *copy = strdup(command);
    if (s == NULL || copy == NULL) {
        free(s);
        free(copy);
        fail(job, "out of memory for a session.");
        return NULL;
    }
    s->job = job;
    s->command = copy;
    child_init(&s->child, &job->lock);
    pthread_mutex_lock(&job->lock);
    s->next = job->sessions;
    job->sessions = s;
    pthread_mutex_unlock(&job->lock);
    return s;
}

void session_free(struct session *s)
{
    free(s->object);
    free(s->command);
    free(s);
}

static const char *string_value(struct job *job, int variable)
{
    char *value = NULL;
    if (plugin.core->get_value(job->ctx, variable, &value) != RC_OK)
        return NULL;
    return value;
}

int number_value(struct job *job, int variable)
{
    int value = 0;
    if (plugin.core->get_value(job->ctx, variable, &value) != RC_OK)
        return 0;
    return value;
}

char job_status(struct job *job)
{
    int status = number_value(job, VAR_JOB_STATUS);
    if (status == 'W') /* terminated, with warnings: a success like any other */
        return 'T';
    return status != 0 ? (char)status : 'f';
}

static bool send_text(struct session *s, const char *key, const char *value)
{
    if (value == NULL)
        return true;
    if (strchr(value, '\n') != NULL) {
        fail(s->job, "%s contains a line break, which cannot be handed to the backend.", key);
        return broken(s);
    }
    return COMMAND(s, "describing the job", "%s=%s", key, value);
}

static bool send_job(struct session *s)
{
    static const char type[] = { [KIND_BACKUP] = 'B', [KIND_ESTIMATE] = 'E', [KIND_RESTORE] = 'R' };
    static const char doing[] = "describing the job";
    struct job *job = s->job;
    const struct dialect *d = plugin.dialect;

    bool ok = COMMAND(s, doing, "Job") && send_text(s, "Name", job->name)
              && COMMAND(s, doing, "JobID=%d", number_value(job, VAR_JOB_ID))
              && COMMAND(s, doing, "Type=%c", type[s->kind]);
    if (s->kind == KIND_RESTORE) {
        /* Where is NULL from EndRestoreJob on: this is early enough. */
        const char *where = string_value(job, d->var_where);
        int replace = number_value(job, d->var_replace);
        ok = ok && send_text(s, "Where", where != NULL ? where : "")
             && send_text(s, "RegexWhere", string_value(job, d->var_regex_where));
        if (isalpha(replace))
            ok = ok && COMMAND(s, doing, "Replace=%c", replace);
    } else {
        const char *previous = string_value(job, d->var_prev_job);
        if (job->level != 0)
            ok = ok && COMMAND(s, doing, "Level=%c", job->level);
        if (job->since != 0)
            ok = ok && COMMAND(s, doing, "Since=%" PRId64, job->since);
        if (previous != NULL && previous[0] != '\0')
            ok = ok && send_text(s, "PrevJobName", previous);
    }
    return ok && send_text(s, "WorkingDir", string_value(job, VAR_WORKING_DIR))
           && send_text(s, "ExePath", string_value(job, d->var_exe_path))
           && send_text(s, "Client", string_value(job, VAR_CLIENT))
           && COMMAND(s, doing, "Accurate=%d", number_value(job, VAR_ACCURATE) != 0)
           && COMMAND(s, doing, "BaculaVersion=%" PRIu32, d->interface)
           && send_packet(s, 'F', NULL, 0, doing) && expect_end(s, "accepting the job");
}

static bool send_object(struct session *s, const struct restore_object *object)
{
    static const char doing[] = "receiving a restore object";
    bool ok = COMMAND(s, doing, "RESTOREOBJ:%s", object->name)
              && COMMAND(s, doing, "RESTOREOBJ_JOBID:%" PRIu32, object->job_id)
              && COMMAND(s, doing, "RESTOREOBJ_TYPE:%d", object->type)
              && COMMAND(s, doing, "RESTOREOBJ_LEN:%" PRIu32, object->length);
    for (uint32_t at = 0; ok && at < object->length;) {
        uint32_t n = object->length - at < 65536 ? object->length - at : 65536;
        ok = send_packet(s, 'D', object->data + at, n, doing);
        at += n;
    }
    return ok && send_packet(s, 'F', NULL, 0, doing) && expect_ok(s, doing);
}

/* All of them: a restore has one session. */
static bool send_objects(struct session *s)
{
    for (struct restore_object *o = s->job->objects; o != NULL; o = o->next) {
        if (!send_object(s, o))
            return false;
        free(o->data); /* nobody else wants it */
        o->data = NULL;
        o->length = 0;
    }
    return COMMAND(s, "receiving restore objects", "OBJECTSEND")
           && expect_end(s, "working out the restore");
}

bool session_start(struct session *s, enum kind kind)
{
    static const char *const verb[] = { [KIND_BACKUP] = "BackupStart",
                                        [KIND_ESTIMATE] = "EstimateStart",
                                        [KIND_RESTORE] = "RestoreStart" };
    struct job *job = s->job;
    char line[LINE_SIZE];

    s->kind = kind;
    if (job->wake < 0) {
        fail(job, "no event descriptor: the File Daemon is out of file descriptors.");
        return broken(s);
    }
    const char *name = string_value(job, VAR_JOB_NAME);
    if (job->name == NULL && (name == NULL || (job->name = strdup(name)) == NULL)) {
        fail(job, "the job's unique name is unknown.");
        return broken(s);
    }
    int error = child_start(&s->child, plugin.backend);
    if (error != 0) {
        fail(job, "cannot start the backend %s: %s. Install it there, or set "
                  "PODHEITOR_PROXMOX_BACKEND in the File Daemon's environment.",
             plugin.backend, strerror(error));
        return broken(s);
    }
    s->pt = (struct ptcomm){ .in = s->child.from, .out = s->child.to, .wake = job->wake,
                             .idle_ms = plugin.idle_ms, .heard = heard, .owner = s };
    if (!COMMAND(s, "greeting", "Hello podheitor-proxmox 3 offset jobstatus fileindex")
        || !expect_line(s, line, "greeting"))
        return false;
    if (strncmp(line, "Hello Bacula", 12) != 0)
        return protocol_error(s, "expected \"Hello Bacula\", got \"%.100s\"", line);
    return send_job(s) && COMMAND(s, "sending parameters", "Params")
           && send_text(s, "Plugin", s->command)
           && send_packet(s, 'F', NULL, 0, "sending parameters")
           && expect_end(s, "checking its parameters")
           && COMMAND(s, "starting", "%s", verb[kind]) && expect_end(s, "preparing the job")
           && (kind != KIND_RESTORE || send_objects(s));
}

/* -- the ways out ----------------------------------------------------------- */

void session_goodbye(struct session *s)
{
    struct pt_packet packet;
    /* The job's status is settled: whatever goes wrong here is only worth a warning. */
    bool ok = !s->broken && pt_command(&s->pt, "END") == PT_OK;
    s->pt.deadline_ms = pt_now_ms() + GOODBYE_MS;
    while (ok && (ok = pt_next(&s->pt, &packet) == PT_OK) && message_type(packet.letter) != 0)
        ok = hear(s, &packet);
    ok = ok && packet.letter == 'F' && pt_write(&s->pt, 'T', NULL, 0) == PT_OK;
    hang_up(s);
    s->clean = ok && child_wait(&s->child, GOODBYE_MS, false);
    if (!s->clean)
        say(s->job, plugin.dialect->warning,
            "the backend did not end when it was told to; it will be stopped and cleaned up after.");
}

void session_stop(struct session *s)
{
    hang_up(s);
    child_signal(&s->child, SIGTERM);
}

void session_reap(struct session *s)
{
    if (child_wait(&s->child, TERM_MS, true))
        return;
    child_signal(&s->child, SIGKILL);
    child_wait(&s->child, KILL_MS, true);
}
