/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * A bacula-fd for tests: loads the plug-in and drives it in the order of the real
 * daemon, for any interface number, with a volume in memory.
 *
 *   fake_host PLUGIN.so INTERFACE STAGES JOBS COMMAND...
 *
 * STAGES is a comma list of backup, estimate, restore, console; each of JOBS
 * threads goes through them.  In the environment: FAKE_CANCEL_MS cancels every
 * job from another thread; FAKE_STATUS is the status at the end of the job;
 * FAKE_BAD_PACKET one of save, io, restore, object; FAKE_OPTIONS the text of an
 * edited plugin configuration.  What happens is told on stdout, one event a line.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bacula_abi.h"

struct chunk {
    struct chunk *next;
    int64_t offset;
    size_t length;
    char data[];
};

struct record { /* one thing on the volume */
    struct record *next;
    char *command, *name;
    int type;
    struct stat statp;
    uint64_t flags;
    struct chunk *chunks, *last;
};

struct host_job {
    struct bacula_ctx ctx;
    int id;
    char stage, status, name[64];
    struct record *volume, *last;
    pthread_mutex_t lock; /* guards status against the cancel thread */
};

static struct plugin_funcs *plug;
static int interface;
static char **commands;
static const char *stages;
static pthread_mutex_t out = PTHREAD_MUTEX_INITIALIZER;

static void tell(const struct host_job *job, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void tell(const struct host_job *job, const char *format, ...)
{
    va_list arguments;
    pthread_mutex_lock(&out);
    printf("job=%d stage=%c ", job->id, job->stage);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    pthread_mutex_unlock(&out);
}

static char status_of(struct host_job *job)
{
    pthread_mutex_lock(&job->lock);
    char status = job->status;
    pthread_mutex_unlock(&job->lock);
    return status;
}

static void set_status(struct host_job *job, char status)
{
    pthread_mutex_lock(&job->lock);
    if (job->status == 'R' || job->status == 'T')
        job->status = status;
    pthread_mutex_unlock(&job->lock);
}

/* -- what the daemon offers -------------------------------------------------- */

static int get_value(struct bacula_ctx *ctx, int variable, void *value)
{
    struct host_job *job = ctx->core;
    bool new = interface == IFACE_15_0;
    int previous = interface == IFACE_11_0 ? 19 : 20;
    if (variable == VAR_JOB_ID)
        *(int *)value = job->id;
    else if (variable == VAR_CLIENT)
        *(const char **)value = "fake-fd";
    else if (variable == VAR_JOB_NAME)
        *(const char **)value = job->name;
    else if (variable == VAR_JOB_STATUS)
        *(int *)value = status_of(job);
    else if (variable == VAR_ACCURATE)
        *(int *)value = 1;
    else if (variable == VAR_WORKING_DIR)
        *(const char **)value = "/var/lib/fake";
    else if (variable == (new ? 15 : 14))
        *(const char **)value = job->stage == 'r' ? "/where" : NULL;
    else if (variable == (new ? 16 : 15))
        *(const char **)value = NULL;
    else if (variable == (new ? 17 : 16))
        *(const char **)value = "/usr/sbin";
    else if (variable == previous)
        *(const char **)value = "before.2026-01-01_00.00.00_01";
    else if (variable == (interface == IFACE_11_0 ? 22 : 23))
        *(int *)value = 7;
    else if (variable == (interface == IFACE_11_0 ? 23 : 24))
        *(int *)value = 'a';
    else {
        tell(job, "UNKNOWN variable %d", variable);
        return RC_ERROR;
    }
    return RC_OK;
}

static int job_message(struct bacula_ctx *ctx, const char *file, int line, int type, int64_t mtime,
                       const char *format, ...)
{
    struct host_job *job = ctx->core;
    char text[4096];
    va_list arguments;
    (void)file, (void)line, (void)mtime;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    int fatal = interface == IFACE_15_0 ? 4 : 3;
    if (type == fatal)
        set_status(job, 'f');
    if (length > 2000 || text[length - 1] != '\n')
        tell(job, "BAD MESSAGE of %d bytes", length);
    text[strcspn(text, "\n")] = '\0';
    tell(job, "message %s length=%d %.200s",
         type == fatal ? "FATAL" : type == fatal + 1 ? "ERROR" : type == fatal + 2 ? "WARNING"
         : type == fatal + 3 ? "INFO" : "OTHER", length, text);
    return RC_OK;
}

/* -- a job ------------------------------------------------------------------- */

static bool bad(const char *packet)
{
    const char *chosen = getenv("FAKE_BAD_PACKET");
    return chosen != NULL && strcmp(chosen, packet) == 0;
}

static int event(struct host_job *job, uint32_t type, void *value)
{
    struct bacula_event packet = { type };
    return plug->handle_event(&job->ctx, &packet, value);
}

static void *canceller(void *argument)
{
    struct host_job *job = argument;
    long ms = atol(getenv("FAKE_CANCEL_MS"));
    nanosleep(&(struct timespec){ ms / 1000, ms % 1000 * 1000000 }, NULL);
    if (status_of(job) == 'R') {
        event(job, EV_CANCEL_COMMAND, NULL);
        set_status(job, 'A');
    }
    return NULL;
}

static void begin(struct host_job *job, char stage)
{
    char text[100];
    job->stage = stage;
    job->status = 'R';
    snprintf(job->name, sizeof job->name, "fake%c.2026-11-23_00.00.00_%02d", stage, job->id);
    job->ctx = (struct bacula_ctx){ .core = job };
    plug->new_plugin(&job->ctx);
    snprintf(text, sizeof text, "JobId=%d Job=%s", job->id, job->name);
    event(job, EV_JOB_START, text);
}

static void finish(struct host_job *job)
{
    if (strchr("AEf", status_of(job)) == NULL)
        event(job, EV_JOB_END, NULL);
    plug->free_plugin(&job->ctx);
    if (job->ctx.ours != NULL)
        tell(job, "LEFT context");
    tell(job, "end status=%c", status_of(job));
}

static void store(struct record *record, int64_t offset, const char *data, size_t length)
{
    struct chunk *chunk = malloc(sizeof *chunk + length);
    chunk->next = NULL;
    chunk->offset = offset;
    chunk->length = length;
    memcpy(chunk->data, data, length);
    if (record->last != NULL)
        record->last->next = chunk;
    else
        record->chunks = chunk;
    record->last = chunk;
}

static void init_io(struct io_pkt *io, int func)
{
    memset(io, 0, sizeof *io);
    io->pkt_size = bad("io") ? 71 : (int)sizeof *io;
    io->pkt_end = sizeof *io;
    io->func = func;
}

static void read_file(struct host_job *job, struct record *record)
{
    int size = interface == IFACE_9_6 ? 65528 : 65536;
    char *buffer = malloc((size_t)size); /* its end is watched by ASan */
    struct io_pkt io;
    int reads = 0, small = 0, before = size;
    int64_t bytes = 0, end = 0;

    init_io(&io, IO_OPEN);
    io.fname = record->name;
    plug->plugin_io(&job->ctx, &io);
    while (io.status >= 0 && status_of(job) == 'R') {
        init_io(&io, IO_READ);
        io.buf = buffer;
        io.count = size;
        if (plug->plugin_io(&job->ctx, &io) != RC_OK || io.status <= 0)
            break;
        /* A short buffer is in order only where the data does not go on. */
        if (before < size && io.offset == end)
            small++;
        store(record, io.offset, buffer, (size_t)io.status);
        before = io.status;
        end = io.offset + io.status;
        bytes += io.status;
        reads++;
    }
    tell(job, "read %s reads=%d bytes=%lld needless=%d last=%d", record->name, reads,
         (long long)bytes, small, io.status);
    init_io(&io, IO_CLOSE);
    plug->plugin_io(&job->ctx, &io);
    free(buffer);
}

union save {
    struct save_pkt_14 v14;
    struct save_pkt_21 v21;
    struct save_pkt_23 v23;
};

#define INIT(p)                                                                                    \
    do {                                                                                           \
        (p)->pkt_size = bad("save") ? 17 : (int)sizeof *(p);                                       \
        (p)->pkt_end = sizeof *(p);                                                                \
        (p)->portable = true;                                                                      \
        (p)->cmd = (char *)command;                                                                \
    } while (0)

#define TAKE(p)                                                                                    \
    do {                                                                                           \
        record->type = (p)->type;                                                                  \
        record->name = strdup((p)->fname);                                                         \
        record->statp = (p)->statp;                                                                \
        record->flags = (p)->flags;                                                                \
        no_read = (p)->no_read;                                                                    \
        if ((p)->object != NULL)                                                                   \
            store(record, 0, (p)->object, (size_t)(p)->object_len);                                \
        if ((p)->pkt_end != sizeof *(p) || (p)->link == NULL || !(p)->portable)                    \
            tell(job, "BAD save packet");                                                          \
    } while (0)

static void save(struct host_job *job, const char *command)
{
    int rc;
    do {
        union save *pkt = calloc(1, sizeof *pkt); /* on the heap: ASan watches */
        bool no_read = false;
        switch (interface) {
        case IFACE_9_6: INIT(&pkt->v14); break;
        case IFACE_11_0: INIT(&pkt->v21); break;
        default: INIT(&pkt->v23); break;
        }
        rc = plug->start_backup_file(&job->ctx, pkt);
        if (rc != RC_OK) {
            tell(job, "start_backup_file rc=%d", rc);
            free(pkt);
            return;
        }
        struct record *record = calloc(1, sizeof *record);
        record->command = strdup(command);
        switch (interface) {
        case IFACE_9_6: TAKE(&pkt->v14); break;
        case IFACE_11_0: TAKE(&pkt->v21); break;
        default: TAKE(&pkt->v23); break;
        }
        free(pkt);
        if (job->last != NULL)
            job->last->next = record;
        else
            job->volume = record;
        job->last = record;
        tell(job, "entry type=%d name=%s size=%lld flags=%llx no_read=%d", record->type,
             record->name, (long long)record->statp.st_size, (unsigned long long)record->flags,
             no_read);
        if (record->type == FT_REG && !no_read && job->stage == 'b')
            read_file(job, record);
        rc = plug->end_backup_file(&job->ctx);
    } while (rc == RC_MORE && status_of(job) == 'R');
    tell(job, "end_backup_file rc=%d", rc);
}

static void drop_volume(struct host_job *job)
{
    while (job->volume != NULL) {
        struct record *record = job->volume;
        job->volume = record->next;
        while (record->chunks != NULL) {
            struct chunk *next = record->chunks->next;
            free(record->chunks);
            record->chunks = next;
        }
        free(record->command);
        free(record->name);
        free(record);
    }
    job->last = NULL;
}

static void backup(struct host_job *job, char stage)
{
    drop_volume(job);
    begin(job, stage);
    event(job, EV_SINCE, (void *)(intptr_t)5000000000);
    event(job, EV_LEVEL, (void *)(intptr_t)'I');
    for (char **command = commands; *command != NULL; command++)
        event(job, EV_PLUGIN_COMMAND, *command);
    for (char **command = commands; *command != NULL && status_of(job) == 'R'; command++) {
        int rc = event(job, stage == 'b' ? EV_BACKUP_COMMAND : EV_ESTIMATE_COMMAND, *command);
        tell(job, "command rc=%d", rc);
        if (rc == RC_OK)
            save(job, *command);
    }
    char seen[] = "/@proxmox/100/x", other[] = "/etc/passwd";
    tell(job, "check_file ours=%d other=%d", plug->check_file(&job->ctx, seen),
         plug->check_file(&job->ctx, other));
    if (stage == 'b') {
        set_status(job, getenv("FAKE_STATUS") != NULL ? getenv("FAKE_STATUS")[0] : 'T');
        event(job, EV_END_BACKUP_JOB, NULL);
    }
    finish(job);
}

static void send_object(struct host_job *job, char *command, char *name, int type,
                        const char *data, size_t length)
{
    struct restore_object_pkt *pkt = calloc(1, sizeof *pkt);
    char *copy = malloc(length);
    memcpy(copy, data, length);
    if (length > 0 && copy[0] == '\1')
        copy[0] = '\0'; /* as a catalogue loses it; the environment cannot carry it */
    pkt->pkt_size = bad("object") ? 60 : (int)sizeof *pkt;
    pkt->pkt_end = sizeof *pkt;
    pkt->object_name = name;
    pkt->object = copy;
    pkt->plugin_name = command;
    pkt->object_type = type;
    pkt->object_len = pkt->object_full_len = (int32_t)length;
    pkt->job_id = 42;
    event(job, EV_RESTORE_OBJECT, pkt);
    free(copy);
    free(pkt);
}

static void write_file(struct host_job *job, struct record *record)
{
    struct io_pkt io;
    int64_t at = 0;
    init_io(&io, IO_OPEN);
    io.fname = record->name;
    io.flags = 01101;
    if (plug->plugin_io(&job->ctx, &io) != RC_OK)
        return;
    for (struct chunk *chunk = record->chunks; chunk != NULL; chunk = chunk->next) {
        if (chunk->offset != at && (record->flags & FO_OFFSETS) != 0) {
            init_io(&io, IO_SEEK);
            io.offset = chunk->offset;
            plug->plugin_io(&job->ctx, &io);
        }
        init_io(&io, IO_WRITE);
        io.buf = chunk->data;
        io.count = (int32_t)chunk->length;
        if (plug->plugin_io(&job->ctx, &io) != RC_OK || io.status != io.count) {
            tell(job, "write status=%d", io.status);
            return;
        }
        at = chunk->offset + (int64_t)chunk->length;
    }
    init_io(&io, IO_CLOSE);
    tell(job, "close rc=%d", plug->plugin_io(&job->ctx, &io));
}

static void restore(struct host_job *job)
{
    char name[1000], option_name[] = "RestoreOptions";
    begin(job, 'r');
    for (struct record *r = job->volume; r != NULL; r = r->next)
        if (r->type == FT_RESTORE_FIRST && r->chunks != NULL)
            send_object(job, r->command, r->name, r->type, r->chunks->data, r->chunks->length);
    if (getenv("FAKE_OPTIONS") != NULL)
        send_object(job, commands[0], option_name, FT_PLUGIN_CONFIG_FILLED, getenv("FAKE_OPTIONS"),
                    strlen(getenv("FAKE_OPTIONS")));
    event(job, EV_RESTORE_OBJECT, NULL);
    event(job, EV_START_RESTORE_JOB, NULL);
    for (struct record *r = job->volume; r != NULL && status_of(job) == 'R'; r = r->next) {
        if (r->type != FT_REG)
            continue;
        int rc = event(job, EV_RESTORE_COMMAND, r->command);
        if (rc != RC_OK || (rc = plug->start_restore_file(&job->ctx, r->command)) != RC_OK) {
            tell(job, "RAW restore rc=%d", rc); /* what the core would do, and must not */
            continue;
        }
        struct restore_pkt *pkt = calloc(1, sizeof *pkt);
        snprintf(name, sizeof name, "/where%s", r->name);
        pkt->pkt_size = bad("restore") ? 228 : (int)sizeof *pkt;
        pkt->pkt_end = sizeof *pkt;
        pkt->statp = r->statp;
        pkt->ofname = name;
        pkt->where = "/where";
        pkt->replace = 'a';
        rc = plug->create_file(&job->ctx, pkt);
        tell(job, "create %s rc=%d status=%d", name, rc, pkt->create_status);
        if (rc == RC_OK && pkt->create_status == CF_EXTRACT)
            write_file(job, r);
        if (rc == RC_OK)
            plug->set_file_attributes(&job->ctx, pkt);
        plug->end_restore_file(&job->ctx);
        free(pkt);
    }
    event(job, EV_END_RESTORE_JOB, NULL);
    set_status(job, 'T');
    finish(job);
}

static void *run(void *argument)
{
    struct host_job job = { .id = (int)(intptr_t)argument };
    pthread_mutex_init(&job.lock, NULL);
    char *list = strdup(stages), *rest = NULL;
    for (char *stage = strtok_r(list, ",", &rest); stage != NULL; stage = strtok_r(NULL, ",", &rest)) {
        pthread_t thread;
        bool cancelling = getenv("FAKE_CANCEL_MS") != NULL;
        if (stage[0] == 'c') { /* as a console connection, beside the other jobs */
            begin(&job, 'c');
            finish(&job);
            continue;
        }
        job.status = 'R';
        job.ctx.ours = NULL;
        if (cancelling && pthread_create(&thread, NULL, canceller, &job) != 0)
            abort();
        if (stage[0] == 'r')
            restore(&job);
        else
            backup(&job, stage[0]);
        if (cancelling)
            pthread_join(thread, NULL);
    }
    free(list);
    drop_volume(&job);
    pthread_mutex_destroy(&job.lock);
    return NULL;
}

static int open_files(void)
{
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (readdir(dir) != NULL)
        count++;
    closedir(dir);
    return count;
}

int main(int argc, char **argv)
{
    static uint64_t offered[21]; /* 168 bytes, longer than any interface's table */
    struct bacula_funcs *core = (struct bacula_funcs *)offered;
    struct plugin_info *info = NULL;
    if (argc < 6)
        return 2;
    interface = atoi(argv[2]);
    stages = argv[3];
    commands = argv + 5;
    signal(SIGPIPE, SIG_IGN); /* as the daemon does */

    void *library = dlopen(argv[1], RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    int (*load)(struct bacula_info *, struct bacula_funcs *, struct plugin_info **,
                struct plugin_funcs **);
    int (*unload)(void);
    *(void **)&load = dlsym(library, "loadPlugin");
    *(void **)&unload = dlsym(library, "unloadPlugin");
    struct bacula_info binfo = { sizeof binfo, (uint32_t)interface };
    core->size = sizeof offered;
    core->version = (uint32_t)interface;
    core->get_value = get_value;
    core->job_message = job_message;
    int rc = load(&binfo, core, &info, &plug);
    printf("load rc=%d\n", rc);
    if (rc != RC_OK)
        return 0;
    printf("info size=%u interface=%u license=%s table=%u/%u\n", info->size, info->version,
           info->license, plug->size, plug->version);

    int before = open_files(), jobs = atoi(argv[4]);
    pthread_t *threads = calloc((size_t)jobs, sizeof *threads);
    for (int i = 0; i < jobs; i++)
        if (pthread_create(&threads[i], NULL, run, (void *)(intptr_t)(i + 1)) != 0)
            abort();
    for (int i = 0; i < jobs; i++)
        pthread_join(threads[i], NULL);
    free(threads);
    bool children = waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD;
    printf("left files=%d children=%d\n", open_files() - before, children);
    unload();
    return 0;
}
