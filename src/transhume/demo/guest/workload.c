/*
 * The guest's workload: memory whose every page is known, rewritten and verified all the time, and a
 * heart beat on the console that shows an observer outside how long the guest stood still.
 *
 * Parameters come as words of the kernel's command line (or as arguments, to try it without a VM):
 *
 *   workload.memory_mib=64       how much memory is filled
 *   workload.rate_pages_s=0      pages rewritten in a second, by all threads; 0 rewrites nothing
 *   workload.hot_mib=0           rewrite only within the first so many MiB; 0 means everywhere
 *   workload.verify=1            0 switches the verification off
 *   workload.verify_pages_s=16384  pages verified in a second, by all threads
 *   workload.beat_ms=2           a '.' at least so often
 *   workload.spoil_page=N        damage page N once after the fill, to prove that damage is seen
 *
 * Lines that it writes, each between newlines, among the dots of the heart beat:
 *
 *   ready pages=P
 *   tick seconds=S writes=W verified=V corrupt=C gap_us=G memory_mib=M     once a second; M is all of
 *                               the guest's memory; W, V, C count pages from the start; V counts every thread as if it were the slowest, so when it
 *                               has grown by all pages, every page was verified
 *   CORRUPT page=P expected=HEX found=HEX
 *   failed reason=...
 *
 * Word k of page i in generation g is mix(i, g) + k * STEP, so each word tells its page, its generation
 * and its place. The generations are kept in a table of their own, which moves like any other memory:
 * a page that was lost differs from its table entry. A page and its entry lost together would agree, so
 * the sum of the table is compared with a count of all rewrites after every sweep; such a mismatch is
 * reported as page -1. What was found wrong is put right, so that each damage is counted once.
 *
 * There is one thread for each CPU, with its own range of pages, so no word is shared while it changes.
 * The first thread beats: its dots stop when, and only when, its loop stands still.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <time.h>
#include <unistd.h>

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 8,
    PAGES_PER_MIB = (1 << 20) / PAGE_BYTES,
    SLICE_PAGES = 8,
    CPUS_MAX = 64,
    CORRUPT_LINES_MAX = 64, /* more are only counted: a flood would hold up the heart beat */
};

#define STEP UINT64_C(0x9e3779b97f4a7c15)
#define SECOND_NS INT64_C(1000000000)
#define NAP_NS INT64_C(1000000)
/* A thread that was held up makes good for so much time and no more: no bursts after a stall. */
#define BACKLOG_NS (SECOND_NS / 10)

struct settings {
    uint64_t memory_mib, rate_pages_s, hot_mib, verify, verify_pages_s, beat_ms;
    int64_t spoil_page;
};

/* Work that is due at a steady rate: `done` units since `start_ns`, `per_s` of them wanted a second. */
struct pace {
    uint64_t per_s, done;
    int64_t start_ns;
};

struct worker {
    uint64_t *pages;
    uint32_t *generations;
    uint64_t first, count, hot, stride;
    uint64_t rewrite_cursor, verify_cursor;
    uint64_t rewrites;
    struct pace rewriting, verifying;
    _Atomic uint64_t writes, verified, corrupt;
    int cpu;
};

static struct settings settings = {
    .memory_mib = 64, .verify = 1, .verify_pages_s = 16384, .beat_ms = 2, .spoil_page = -1,
};
static struct worker workers[CPUS_MAX];
static int worker_count;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

/* One write for a whole line, so that lines of several threads and the dots do not mix. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length > 0 && write(STDOUT_FILENO, line, length) < 0)
        return; /* a console that cannot be written to leaves nobody to tell */
}

static uint64_t mix(uint64_t page, uint32_t generation)
{
    uint64_t x = (page << 32) + generation + STEP;
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static void write_page(struct worker *worker, uint64_t index)
{
    uint64_t *word = worker->pages + index * PAGE_WORDS;
    uint64_t value = mix(worker->first + index, worker->generations[index]);
    for (int k = 0; k < PAGE_WORDS; k++, value += STEP)
        word[k] = value;
}

static void report_corrupt(struct worker *worker, int64_t page, uint64_t expected, uint64_t found)
{
    if (atomic_fetch_add(&worker->corrupt, 1) >= CORRUPT_LINES_MAX)
        return;
    say("\nCORRUPT page=%lld expected=%016llx found=%016llx\n", (long long)page, (unsigned long long)expected,
        (unsigned long long)found);
}

static void verify_page(struct worker *worker, uint64_t index)
{
    const uint64_t *word = worker->pages + index * PAGE_WORDS;
    uint64_t value = mix(worker->first + index, worker->generations[index]);
    for (int k = 0; k < PAGE_WORDS; k++, value += STEP) {
        if (word[k] != value) {
            report_corrupt(worker, worker->first + index, value, word[k]);
            write_page(worker, index);
            return;
        }
    }
}

static void verify_table(struct worker *worker)
{
    uint64_t sum = 0;
    for (uint64_t index = 0; index < worker->count; index++)
        sum += worker->generations[index];
    if (sum != worker->rewrites) {
        report_corrupt(worker, -1, worker->rewrites, sum);
        worker->rewrites = sum;
    }
}

/* How many units are due now, at most a slice. */
static uint64_t due(struct pace *pace, int64_t now)
{
    if (pace->per_s == 0)
        return 0;
    int64_t spent_ns = (int64_t)((double)pace->done * 1e9 / (double)pace->per_s);
    int64_t behind_ns = now - pace->start_ns - spent_ns;
    if (behind_ns > BACKLOG_NS)
        pace->start_ns += behind_ns - BACKLOG_NS;
    if (behind_ns <= 0)
        return 0;
    double units = (double)behind_ns * (double)pace->per_s / 1e9 + 1.0;
    return units < SLICE_PAGES ? (uint64_t)units : SLICE_PAGES;
}

static uint64_t rewrite_slice(struct worker *worker, int64_t now)
{
    uint64_t pages = due(&worker->rewriting, now);
    for (uint64_t n = 0; n < pages; n++) {
        uint64_t index = worker->rewrite_cursor;
        worker->rewrite_cursor = (worker->rewrite_cursor + worker->stride) % worker->hot;
        worker->generations[index]++;
        worker->rewrites++;
        write_page(worker, index);
    }
    worker->rewriting.done += pages;
    atomic_fetch_add(&worker->writes, pages);
    return pages;
}

static uint64_t verify_slice(struct worker *worker, int64_t now)
{
    uint64_t pages = due(&worker->verifying, now);
    for (uint64_t n = 0; n < pages; n++) {
        verify_page(worker, worker->verify_cursor++);
        if (worker->verify_cursor == worker->count) {
            worker->verify_cursor = 0;
            verify_table(worker);
        }
    }
    worker->verifying.done += pages;
    atomic_fetch_add(&worker->verified, pages);
    return pages;
}

static uint64_t common_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* A step through the pages that scatters the rewrites and still reaches every page of `hot`. */
static uint64_t scattering_stride(uint64_t hot)
{
    uint64_t stride = hot * 5 / 8 + 1;
    while (common_divisor(stride, hot) != 1)
        stride++;
    return stride;
}

static void nap_until(int64_t when_ns)
{
    struct timespec when = {.tv_sec = when_ns / SECOND_NS, .tv_nsec = when_ns % SECOND_NS};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL);
}

static void pin(int cpu)
{
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    sched_setaffinity(0, sizeof only, &only); /* a wish: the work is right on any CPU */
}

static void *work_silently(void *argument)
{
    struct worker *worker = argument;
    pin(worker->cpu);
    for (;;) {
        int64_t now = now_ns();
        if (rewrite_slice(worker, now) + verify_slice(worker, now) == 0)
            nap_until(now + NAP_NS);
    }
    return NULL;
}

static void tick(int64_t seconds, int64_t gap_ns)
{
    uint64_t writes = 0, slowest = UINT64_MAX, corrupt = 0;
    for (int n = 0; n < worker_count; n++) {
        uint64_t verified = atomic_load(&workers[n].verified);
        slowest = verified < slowest ? verified : slowest;
        writes += atomic_load(&workers[n].writes);
        corrupt += atomic_load(&workers[n].corrupt);
    }
    struct sysinfo machine = {0};
    sysinfo(&machine);
    say("\ntick seconds=%lld writes=%llu verified=%llu corrupt=%llu gap_us=%lld memory_mib=%llu\n",
        (long long)seconds, (unsigned long long)writes, (unsigned long long)(slowest * worker_count),
        (unsigned long long)corrupt, (long long)(gap_ns / 1000),
        (unsigned long long)machine.totalram * machine.mem_unit >> 20);
}

static void work_and_beat(struct worker *worker)
{
    int64_t beat_ns = (int64_t)settings.beat_ms * 1000000;
    int64_t start = now_ns(), last_turn = start, next_beat = start, next_tick = start + SECOND_NS;
    int64_t longest_gap = 0, seconds = 0;
    pin(worker->cpu);
    for (;;) {
        int64_t now = now_ns();
        if (now - last_turn > longest_gap)
            longest_gap = now - last_turn;
        last_turn = now;
        if (now >= next_beat) {
            say(".");
            next_beat = now + beat_ns;
        }
        if (now >= next_tick) {
            tick(++seconds, longest_gap);
            longest_gap = 0;
            next_tick += SECOND_NS;
        }
        if (rewrite_slice(worker, now) + verify_slice(worker, now) == 0)
            nap_until(next_beat < now + NAP_NS ? next_beat : now + NAP_NS);
    }
}

static void *map_memory(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        say("\nfailed reason=cannot map %llu bytes\n", (unsigned long long)bytes);
        exit(1);
    }
    return memory;
}

static void require_memory(uint64_t bytes)
{
    struct sysinfo machine;
    if (sysinfo(&machine) == 0 && bytes > (uint64_t)machine.freeram * machine.mem_unit) {
        say("\nfailed reason=workload.memory_mib wants %llu bytes, %llu are free\n", (unsigned long long)bytes,
            (unsigned long long)machine.freeram * machine.mem_unit);
        exit(1);
    }
}

static void fill(struct worker *worker)
{
    for (uint64_t index = 0; index < worker->count; index++)
        write_page(worker, index);
}

static void start_paces(void)
{
    int64_t start = now_ns();
    uint64_t verify_pages_s = settings.verify ? settings.verify_pages_s : 0;
    for (int n = 0; n < worker_count; n++) {
        workers[n].rewriting = (struct pace){.per_s = settings.rate_pages_s / worker_count, .start_ns = start};
        workers[n].verifying = (struct pace){.per_s = verify_pages_s / worker_count, .start_ns = start};
    }
}

static void divide_work(uint64_t pages)
{
    uint64_t *memory = map_memory(pages * PAGE_BYTES);
    uint32_t *generations = map_memory(pages * sizeof *generations);
    uint64_t hot_pages = settings.hot_mib ? settings.hot_mib * PAGES_PER_MIB : pages;
    for (int n = 0; n < worker_count; n++) {
        struct worker *worker = &workers[n];
        uint64_t end = pages * (n + 1) / worker_count;
        worker->cpu = n;
        worker->first = pages * n / worker_count;
        worker->count = end - worker->first;
        worker->pages = memory + worker->first * PAGE_WORDS;
        worker->generations = generations + worker->first;
        worker->hot = hot_pages / worker_count;
        if (worker->hot > worker->count)
            worker->hot = worker->count;
        worker->stride = scattering_stride(worker->hot);
        fill(worker);
    }
    if (settings.spoil_page >= 0 && (uint64_t)settings.spoil_page < pages)
        memory[settings.spoil_page * PAGE_WORDS + PAGE_WORDS / 2] ^= 1;
}

static void read_word(const char *word)
{
    static const struct {
        const char *name;
        void *value;
    } known[] = {
        {"workload.memory_mib=", &settings.memory_mib},
        {"workload.rate_pages_s=", &settings.rate_pages_s},
        {"workload.hot_mib=", &settings.hot_mib},
        {"workload.verify=", &settings.verify},
        {"workload.verify_pages_s=", &settings.verify_pages_s},
        {"workload.beat_ms=", &settings.beat_ms},
        {"workload.spoil_page=", &settings.spoil_page},
    };
    for (size_t n = 0; n < sizeof known / sizeof known[0]; n++) {
        size_t length = strlen(known[n].name);
        if (strncmp(word, known[n].name, length) == 0)
            *(uint64_t *)known[n].value = strtoull(word + length, NULL, 10);
    }
}

static void read_settings(int count, char **words)
{
    for (int n = 1; n < count; n++)
        read_word(words[n]);
    if (count > 1)
        return;
    static char line[8192];
    FILE *file = fopen("/proc/cmdline", "r");
    if (file == NULL || fgets(line, sizeof line, file) == NULL)
        return;
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
        read_word(word);
    fclose(file);
}

int main(int count, char **words)
{
    read_settings(count, words);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    worker_count = cpus < 1 ? 1 : cpus > CPUS_MAX ? CPUS_MAX : (int)cpus;
    uint64_t pages = settings.memory_mib * PAGES_PER_MIB;
    if (settings.memory_mib == 0 || settings.beat_ms == 0 || pages > INT32_MAX) {
        say("\nfailed reason=workload.memory_mib and workload.beat_ms must be positive\n");
        return 1;
    }
    require_memory(pages * (PAGE_BYTES + sizeof(uint32_t)));
    divide_work(pages);
    say("\nready pages=%llu\n", (unsigned long long)pages);
    start_paces();
    for (int n = 1; n < worker_count; n++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work_silently, &workers[n]) != 0) {
            say("\nfailed reason=cannot start a thread for CPU %d\n", n);
            return 1;
        }
    }
    work_and_beat(&workers[0]);
}
