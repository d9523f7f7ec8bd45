/* SPDX-License-Identifier: AGPL-3.0-or-later */
#define _GNU_SOURCE
#include "session.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bacula cuts a message at 2,000 bytes, its own prefix included. */
enum { MESSAGE_SIZE = 1800, MESSAGES_SIZE = 32768, OBJECT_SIZE = 16 << 20 };
enum { DRAIN_MS = 3000, GOODBYE_MS = 10000, TERM_MS = 10000, KILL_MS = 5000, FAILED_STATUS_MS = 60000 };

/* -- job messages ----------------------------------------------------------- */

static void message(struct job *job, int type, const char *text)
{
    plugin.core->job_message(job->ctx, "podheitor-proxmox", 0, type, 0, "%s\n", text);
}

static void vsay(struct job *job, int type, const char *format, va_list arguments)
{
    char text[MESSAGE_SIZE + 1];
    int n = snprintf(text, sizeof text, "podheitor-proxmox: ");
    vsnprintf(text + n, sizeof text - (size_t)n, format, arguments);
    message(job, type, text);
}

void say(struct job *job, int type, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsay(job, type, format, arguments);
    va_end(arguments);
}

bool fail(struct job *job, const char *format, ...)
{
    va_list arguments;
    job->failed = true;
    if (atomic_load(&job->cancelled))
        return false;
    va_start(arguments, format);
    vsay(job, plugin.dialect->fatal, format, arguments);
    va_end(arguments);
    return false;
}

/* How much of text, at most MESSAGE_SIZE, goes into one message: whole lines if there are any,
 * never half a UTF-8 character. */
static size_t message_cut(const char *text, size_t length)
{
    if (length <= MESSAGE_SIZE)
        return length;
    const char *newline = memrchr(text, '\n', MESSAGE_SIZE);
    if (newline != NULL && newline > text)
        return (size_t)(newline - text) + 1;
    size_t cut = MESSAGE_SIZE;
    while (cut > MESSAGE_SIZE - 4 && ((unsigned char)text[cut] & 0xC0) == 0x80)
        cut--;
    return cut;
}

/* Pass the backend's words on: as an argument, never as a format, and in pieces. */
static void relay(struct job *job, int type, char *text, size_t length, size_t lost)
{
    for (size_t i = 0; i < length; i++)
        if (((unsigned char)text[i] < ' ' && text[i] != '\n' && text[i] != '\t') || text[i] == 127)
            text[i] = '?';
    while (length > 0 && (text[length - 1] == '\n' || text[length - 1] == ' '))
        length--;
    if (length == 0)
        message(job, type, "podheitor-proxmox: the backend sent a message without text");
    while (length > 0) {
        char piece[MESSAGE_SIZE + 1];
        size_t cut = message_cut(text, length);
        memcpy(piece, text, cut);
        piece[cut] = '\0';
        if (piece[cut - 1] == '\n')
            piece[cut - 1] = '\0';
        message(job, type, piece);
        text += cut;
        length -= cut;
    }
    if (lost > 0)
        say(job, type, "(%zu bytes of this message were left out)", lost);
}

/* -- failures of a conversation --------------------------------------------- */

static void hang_up(struct session *s)
{
    s->broken = true;
    s->pt.in = s->pt.out = -1;
    child_close(&s->child); /* end of file is what tells the backend */
}

static bool broken(struct session *s)
{
    hang_up(s);
    s->job->failed = true;
    return false;
}

static bool protocol_error(struct session *s, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static bool protocol_error(struct session *s, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fail(s->job, "protocol error: %s. Plug-in and backend must be of the same version.", text);
    return broken(s);
}

static void printable(char *to, size_t size, const char *from, size_t length)
{
    size_t at = 0;
    for (size_t i = 0; i < length && at + 5 < size; i++)
        at += (size_t)snprintf(to + at, size - at, isprint((unsigned char)from[i]) ? "%c" : "\\x%02x",
                               (unsigned char)from[i]);
    to[at] = '\0';
}

/* The conversation ended in a way the protocol does not know. */
static bool lost(struct session *s, enum pt_status status, const char *doing)
{
    char text[64];
    switch (status) {
    case PT_CANCELLED:
        s->job->failed = true;
        break;
    case PT_CLOSED:
        hang_up(s);
        child_wait(&s->child, DRAIN_MS, true);
        child_describe(&s->child, text, sizeof text);
        fail(s->job, "the backend ended without a goodbye (%s) while %s; its own log says why.", text,
             doing);
        break;
    case PT_TIMEOUT:
        fail(s->job, "the backend was silent for too long (%d s) while %s.",
             (s->pt.deadline_ms != 0 ? plugin.status_ms : s->pt.idle_ms) / 1000, doing);
        break;
    case PT_GARBAGE:
        printable(text, sizeof text, s->pt.header, PT_HEADER);
        return protocol_error(s, "\"%s\" is not a packet header (while %s)", text, doing);
    case PT_HEARD: /* reported where it was heard */
        break;
    case PT_OS:
    case PT_OK:
        fail(s->job, "talking to the backend failed while %s: %s", doing, strerror(s->pt.os_error));
        break;
    }
    return broken(s);
}

/* -- packets ---------------------------------------------------------------- */

static int message_type(char letter)
{
    const struct dialect *d = plugin.dialect;
    switch (letter) {
    case 'A': return d->fatal;
    case 'E':
    case 'Q': return d->error;
    case 'W': return d->warning;
    case 'I':
    case 'V': return d->info;
    case 'S': return d->saved;
    case 'N': return d->notsaved;
    case 'R': return d->restored;
    case 'P': return d->skipped;
    case 'O': return d->mount;
    default: return 0;
    }
}

/* Read the text of a message packet and pass it on.  A and E end the conversation. */
static bool hear(struct session *s, const struct pt_packet *packet)
{
    size_t keep = packet->length < MESSAGES_SIZE ? packet->length : MESSAGES_SIZE;
    char *text = malloc(keep + 1);
    if (text == NULL) {
        fail(s->job, "out of memory for a message of the backend.");
        return broken(s);
    }
    enum pt_status status = pt_read_all(&s->pt, text, keep);
    if (status == PT_OK)
        status = pt_read_all(&s->pt, NULL, packet->length - keep);
    if (status == PT_OK)
        relay(s->job, message_type(packet->letter), text, keep, packet->length - keep);
    free(text);
    if (status != PT_OK)
        return lost(s, status, "sending a message");
    if (packet->letter == 'E')
        fail(s->job, "the backend gave up after the error above.");
    if (packet->letter == 'A' || packet->letter == 'E')
        return broken(s);
    return true;
}

/* The next packet that is not a message. */
static bool receive(struct session *s, struct pt_packet *packet, const char *doing)
{
    if (s->broken)
        return false;
    for (;;) {
        enum pt_status status = pt_next(&s->pt, packet);
        if (status != PT_OK)
            return lost(s, status, doing);
        if (message_type(packet->letter) != 0) {
            if (!hear(s, packet))
                return false;
            continue;
        }
        switch (packet->letter) {
        case 'C':
        case 'D':
            return true;
        case 'F':
        case 'T':
            if (packet->length != 0)
                return protocol_error(s, "%c packet with %" PRIu32 " bytes (while %s)",
                                      packet->letter, packet->length, doing);
            if (packet->letter == 'T') {
                fail(s->job, "the backend hung up while %s.", doing);
                return broken(s);
            }
            return true;
        default:
            return protocol_error(s, "unknown packet letter %c (while %s)", packet->letter, doing);
        }
    }
}

/* What comes while we write: only messages are in order. */
static int heard(void *owner)
{
    struct session *s = owner;
    struct pt_packet packet;
    enum pt_status status = pt_next(&s->pt, &packet);
    if (status != PT_OK)
        lost(s, status, "it should have been listening");
    else if (message_type(packet.letter) == 0)
        protocol_error(s, "%c packet while it was not the backend's turn", packet.letter);
    else
        hear(s, &packet);
    return s->broken ? -1 : 0;
}

/* A write found the pipe closed: the last words, if any, are the better reason. */
static bool write_lost(struct session *s, enum pt_status status, const char *doing)
{
    if (status == PT_CLOSED) {
        struct pt_packet packet;
        s->pt.deadline_ms = pt_now_ms() + DRAIN_MS;
        while (pt_next(&s->pt, &packet) == PT_OK && message_type(packet.letter) != 0)
            if (!hear(s, &packet))
                return false;
        s->pt.deadline_ms = 0;
    }
    return lost(s, status, doing);
}

static bool send_packet(struct session *s, char letter, const void *payload, size_t length,
                        const char *doing)
{
    if (s->broken)
        return false;
    enum pt_status status = pt_write(&s->pt, letter, payload, length);
    return status == PT_OK ? true : write_lost(s, status, doing);
}

#define COMMAND(s, doing, ...) command_sent((s), pt_command_unless(s, __VA_ARGS__), (doing))

#define pt_command_unless(s, ...) ((s)->broken ? PT_HEARD : pt_command(&(s)->pt, __VA_ARGS__))

static bool command_sent(struct session *s, enum pt_status status, const char *doing)
{
    return status == PT_OK ? true : write_lost(s, status, doing);
}

/* Read a C packet's payload as a line, without its newline. */
static bool read_line(struct session *s, const struct pt_packet *packet, char *line)
{
    if (packet->length >= LINE_SIZE)
        return protocol_error(s, "command of %" PRIu32 " bytes", packet->length);
    enum pt_status status = pt_read_all(&s->pt, line, packet->length);
    if (status != PT_OK)
        return lost(s, status, "sending a command");
    size_t length = packet->length;
    if (length > 0 && line[length - 1] == '\n')
        length--;
    line[length] = '\0';
    if (strlen(line) != length)
        return protocol_error(s, "command with a NUL byte: %.60s", line);
    return true;
}

static bool expect_line(struct session *s, char *line, const char *doing)
{
    struct pt_packet packet;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter != 'C')
        return protocol_error(s, "expected a command, got %c (while %s)", packet.letter, doing);
    return read_line(s, &packet, line);
}

static bool expect_end(struct session *s, const char *doing)
{
    struct pt_packet packet;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter == 'F')
        return true;
    char line[LINE_SIZE] = "data";
    if (packet.letter == 'C' && !read_line(s, &packet, line))
        return false;
    return protocol_error(s, "expected F, got %c \"%.100s\" (while %s)", packet.letter, line, doing);
}

static bool expect_ok(struct session *s, const char *doing)
{
    char line[LINE_SIZE];
    if (!expect_line(s, line, doing))
        return false;
    if (strcmp(line, "OK") != 0)
        return protocol_error(s, "expected OK, got \"%.100s\" (while %s)", line, doing);
    return true;
}

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

static int number_value(struct job *job, int variable)
{
    int value = 0;
    if (plugin.core->get_value(job->ctx, variable, &value) != RC_OK)
        return 0;
    return value;
}

char job_status(struct job *job)
{
    int status = number_value(job, VAR_JOB_STATUS);
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

/* Ours by command string; what the operator edited (type 28) belongs to every backend. */
static bool send_objects(struct session *s)
{
    for (struct restore_object *o = s->job->objects; o != NULL; o = o->next) {
        if (o->type != FT_PLUGIN_CONFIG_FILLED && strcmp(o->command, s->command) != 0)
            continue;
        if (!send_object(s, o))
            return false;
        if (o->type != FT_PLUGIN_CONFIG_FILLED) {
            free(o->data); /* no other session wants it */
            o->data = NULL;
            o->length = 0;
        }
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

/* -- backup and estimate ---------------------------------------------------- */

bool session_peek(struct session *s, bool *more)
{
    struct pt_packet packet;
    *more = false;
    if (s->broken)
        return false;
    while (!s->peeked && !s->no_more) {
        if (!receive(s, &packet, "preparing the next file"))
            return false;
        if (packet.letter == 'F') {
            s->no_more = true;
        } else if (packet.letter == 'D') {
            return protocol_error(s, "data without a file");
        } else {
            if (!read_line(s, &packet, s->line))
                return false;
            s->peeked = strcmp(s->line, "FileIndex") != 0;
            if (!s->peeked
                && !COMMAND(s, "telling the file index", "%d",
                            number_value(s->job, plugin.dialect->var_file_index)))
                return false;
        }
    }
    *more = s->peeked;
    return true;
}

/* "KEY:value" → value, or NULL */
static const char *after(const char *line, const char *key)
{
    size_t n = strlen(key);
    return strncmp(line, key, n) == 0 ? line + n : NULL;
}

static bool parse_number(const char *text, int64_t maximum, int64_t *value)
{
    char *end;
    if (!isdigit((unsigned char)text[0]))
        return false;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || number > maximum)
        return false;
    *value = number;
    return true;
}

/* RESTOREOBJ:name / PLUGINCONFIG:name, then KEY_LEN:n, D..., F */
static bool read_object(struct session *s, const char *name, enum entry entry, const char *length_key)
{
    static const char doing[] = "sending a restore object";
    struct pt_packet packet;
    int64_t length;

    snprintf(s->name, sizeof s->name, "%s", name);
    s->entry = entry;
    if (!expect_line(s, s->line, doing))
        return false;
    const char *digits = after(s->line, length_key);
    if (digits == NULL || !parse_number(digits, OBJECT_SIZE, &length))
        return protocol_error(s, "expected %s0..%d, got \"%.100s\"", length_key, OBJECT_SIZE, s->line);
    s->object = calloc(1, (size_t)length + 3);
    if (s->object == NULL) {
        fail(s->job, "out of memory for a restore object of %" PRId64 " bytes.", length);
        return broken(s);
    }
    s->object_length = (uint32_t)length;
    /* bconsole reads a plugin config as text, whose NUL belongs to it.  One to three of them make
     * a length divisible by 3: Bacula 9.6 with SQLite loses objects whose length is 1 modulo 3. */
    if (entry == ENTRY_PLUGIN_CONFIG)
        s->object_length += 3 - s->object_length % 3;
    for (int64_t at = 0;;) {
        if (!receive(s, &packet, doing))
            return false;
        if (packet.letter == 'F' && at == length)
            return true;
        if (packet.letter != 'D' || packet.length > length - at)
            return protocol_error(s, "object %.100s does not have its %" PRId64 " bytes", s->name,
                                  length);
        enum pt_status status = pt_read_all(&s->pt, s->object + at, packet.length);
        if (status != PT_OK)
            return lost(s, status, doing);
        at += packet.length;
    }
}

static bool parse_stat(struct session *s, const char *text)
{
    char type;
    unsigned long long size;
    unsigned uid, gid, mode, links;
    int used = 0;
    if (sscanf(text, "%c %llu %u %u %o %u%n", &type, &size, &uid, &gid, &mode, &links, &used) != 6
        || (text[used] != '\0' && text[used] != ' ') || size > INT64_MAX
        || (type != 'F' && type != 'E' && type != 'D'))
        return protocol_error(s, "attributes not understood: \"STAT:%.100s\"", text);
    s->stat.st_mode = (type == 'D' ? S_IFDIR : S_IFREG) | (mode & 07777);
    s->stat.st_size = (off_t)size;
    s->stat.st_uid = uid;
    s->stat.st_gid = gid;
    s->stat.st_nlink = links;
    s->stat.st_blksize = 65536;
    s->stat.st_blocks = (blkcnt_t)(size / 512 + (size % 512 != 0));
    return true;
}

static bool parse_times(struct session *s, const char *text)
{
    long long access, modified, changed;
    int used = 0;
    if (sscanf(text, "%lld %lld %lld%n", &access, &modified, &changed, &used) != 3
        || text[used] != '\0')
        return protocol_error(s, "times not understood: \"TSTAMP:%.100s\"", text);
    s->stat.st_atim.tv_sec = access;
    s->stat.st_mtim.tv_sec = modified;
    s->stat.st_ctim.tv_sec = changed;
    return true;
}

static bool read_file_head(struct session *s, const char *name)
{
    static const char doing[] = "describing a file";
    struct pt_packet packet;
    const char *value;

    if (name[0] != '/')
        return protocol_error(s, "file name \"%.100s\" is not absolute", name);
    snprintf(s->name, sizeof s->name, "%s", name);
    s->entry = ENTRY_FILE;
    memset(&s->stat, 0, sizeof s->stat);
    s->offsets = s->has_data = s->at_end = false;
    s->position = 0;
    for (;;) {
        if (!receive(s, &packet, doing))
            return false;
        if (packet.letter == 'F')
            break;
        if (packet.letter != 'C')
            return protocol_error(s, "data inside the attributes of %.100s", s->name);
        if (!read_line(s, &packet, s->line))
            return false;
        bool ok;
        if ((value = after(s->line, "STAT:")) != NULL)
            ok = parse_stat(s, value);
        else if ((value = after(s->line, "TSTAMP:")) != NULL)
            ok = parse_times(s, value);
        else if (strcmp(s->line, "OPTIONS:offsets") == 0)
            ok = s->offsets = true;
        else
            ok = protocol_error(s, "unknown attribute \"%.100s\" of %.100s", s->line, s->name);
        if (!ok)
            return false;
    }
    if (s->stat.st_mode == 0)
        return protocol_error(s, "no STAT for %.100s", s->name);
    if (s->kind != KIND_BACKUP)
        return true;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter == 'F')
        return true;
    if (packet.letter == 'C') {
        if (!read_line(s, &packet, s->line))
            return false;
        s->has_data = strcmp(s->line, "DATA") == 0;
    }
    return s->has_data
           || protocol_error(s, "expected DATA or F after the attributes of %.100s", s->name);
}

bool session_entry(struct session *s)
{
    const char *name;
    if (s->broken)
        return false;
    s->peeked = false;
    if ((name = after(s->line, "FNAME:")) != NULL)
        return read_file_head(s, name);
    if ((name = after(s->line, "RESTOREOBJ:")) != NULL)
        return read_object(s, name, ENTRY_RESTORE_OBJECT, "RESTOREOBJ_LEN:");
    if ((name = after(s->line, "PLUGINCONFIG:")) != NULL)
        return read_object(s, name, ENTRY_PLUGIN_CONFIG, "PLUGINCONFIG_LEN:");
    return protocol_error(s, "unknown command \"%.100s\"", s->line);
}

/* Between D packets of a file.  *jumped: the next byte does not continue the previous one. */
static bool next_data(struct session *s, bool *jumped)
{
    struct pt_packet packet;
    *jumped = false;
    if (!receive(s, &packet, "sending a file's data"))
        return false;
    if (packet.letter == 'D')
        return true;
    if (packet.letter == 'F') {
        s->at_end = true;
        return true;
    }
    int64_t offset;
    if (!read_line(s, &packet, s->line))
        return false;
    const char *digits = after(s->line, "OFFSET:");
    if (digits == NULL || !parse_number(digits, INT64_MAX - PT_MAX_PAYLOAD, &offset))
        return protocol_error(s, "expected data of %.100s, got \"%.100s\"", s->name, s->line);
    *jumped = offset != s->position;
    if (*jumped && !s->offsets)
        return protocol_error(s, "%.100s jumps to %" PRId64 " but was not announced with offsets",
                              s->name, offset);
    s->position = offset;
    return true;
}

bool session_read(struct session *s, char *buffer, size_t size, size_t *length, int64_t *offset)
{
    *length = 0;
    *offset = s->position;
    if (s->broken)
        return false;
    while (*length < size && s->has_data && !s->at_end) {
        if (s->pt.left == 0) {
            bool jumped;
            if (!next_data(s, &jumped))
                return false;
            if (jumped && *length > 0)
                return true;
            if (*length == 0)
                *offset = s->position;
            continue;
        }
        ssize_t n = pt_read(&s->pt, buffer + *length, size - *length);
        if (n < 0)
            return lost(s, (enum pt_status)n, "sending a file's data");
        *length += (size_t)n;
        s->position += n;
    }
    return true;
}

bool session_entry_done(struct session *s)
{
    free(s->object);
    s->object = NULL;
    if (s->broken)
        return false;
    if (s->entry == ENTRY_FILE && s->has_data && !s->at_end) {
        /* The storage daemon may be gone, which the job log knows already. */
        if (job_status(s->job) != 'f')
            fail(s->job, "%.200s was not read to its end by the File Daemon.", s->name);
        return broken(s);
    }
    s->entry = ENTRY_NONE;
    return true;
}

bool session_job_status(struct session *s, char status)
{
    /* In mid-file the backend is not listening: the closed pipe tells it instead. */
    if (s->broken || !s->no_more)
        return false;
    s->pt.deadline_ms = pt_now_ms() + (status == 'T' ? plugin.status_ms : FAILED_STATUS_MS);
    bool ok = COMMAND(s, "hearing the job's status", "JobStatus=%c", status)
              && send_packet(s, 'F', NULL, 0, "hearing the job's status")
              && expect_end(s, "closing its books");
    s->pt.deadline_ms = 0;
    s->confirmed = ok && status == 'T';
    return ok;
}

/* -- restore ---------------------------------------------------------------- */

bool session_restore_file(struct session *s, const struct restore_pkt *pkt)
{
    static const char doing[] = "receiving a file's attributes";
    const struct stat *st = &pkt->statp;
    char line[LINE_SIZE];

    snprintf(s->name, sizeof s->name, "%s", pkt->ofname);
    s->data_open = s->data_done = false;
    s->position = s->peer_position = 0;
    s->answer = ANSWER_SKIP;
    if (strchr(pkt->ofname, '\n') != NULL) {
        fail(s->job, "file name with a line break.");
        return broken(s);
    }
    if (!COMMAND(s, doing, "FNAME:%s", pkt->ofname)
        || !COMMAND(s, doing, "STAT:%c %lld %u %u %o %u", S_ISDIR(st->st_mode) ? 'D' : 'F',
                    (long long)st->st_size, st->st_uid, st->st_gid,
                    (unsigned)(st->st_mode & 07777) | (unsigned)(st->st_mode & S_IFMT),
                    (unsigned)st->st_nlink)
        || !COMMAND(s, doing, "TSTAMP:%lld %lld %lld", (long long)st->st_atim.tv_sec,
                    (long long)st->st_mtim.tv_sec, (long long)st->st_ctim.tv_sec)
        || !send_packet(s, 'F', NULL, 0, doing) || !expect_line(s, line, "deciding about a file"))
        return false;
    if (strcmp(line, "OK") == 0)
        s->answer = ANSWER_EXTRACT;
    else if (strcmp(line, "CORE") == 0)
        s->answer = ANSWER_CORE;
    else if (strcmp(line, "SKIP") != 0)
        return protocol_error(s, "expected OK, SKIP or CORE, got \"%.100s\"", line);
    return true;
}

static bool open_data(struct session *s)
{
    if (s->answer != ANSWER_EXTRACT || s->data_done)
        return protocol_error(s, "Bacula sends data of %.100s although it is not wanted", s->name);
    if (!s->data_open && !COMMAND(s, "receiving a file", "DATA"))
        return false;
    s->data_open = true;
    return true;
}

bool session_write(struct session *s, const char *buffer, size_t length)
{
    static const char doing[] = "receiving a file's data";
    if (s->broken || !open_data(s))
        return false;
    if (s->position != s->peer_position && !COMMAND(s, doing, "OFFSET:%" PRId64, s->position))
        return false;
    for (size_t at = 0; at < length;) { /* one round, unless the network buffer was made huge */
        size_t n = length - at < PT_MAX_PAYLOAD ? length - at : PT_MAX_PAYLOAD;
        if (!send_packet(s, 'D', buffer + at, n, doing))
            return false;
        at += n;
    }
    s->position += (int64_t)length;
    s->peer_position = s->position;
    return true;
}

bool session_restore_file_done(struct session *s)
{
    if (s->broken)
        return false;
    if (s->answer != ANSWER_EXTRACT || s->data_done)
        return true;
    if (!open_data(s) || !send_packet(s, 'F', NULL, 0, "receiving the end of a file")
        || !expect_ok(s, "finishing a file"))
        return false;
    s->data_done = true;
    return true;
}

bool session_finish(struct session *s)
{
    s->confirmed = COMMAND(s, "finishing the restore", "FINISH")
                   && expect_end(s, "finishing the restore");
    return s->confirmed;
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
