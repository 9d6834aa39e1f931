/* A pool of threads that sleep until there is work, for any number of calls at the same time.

   Why not OpenMP: torch brings a libgomp of its own, so a second one would be in the process; its threads spin after
   each region, beside the work that this must not disturb; every calling thread gets a team of its own; and a child of
   fork that uses it hangs. Here the caller works too, others sleep on a condition, and a child starts without any. */

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct job {
    void (*run)(void *context, int worker, int64_t task);
    void *context;
    int64_t num_tasks;
    atomic_llong next_task;
    atomic_int num_workers; /* that have joined: the next one's number */
    int wanted, active;     /* helpers still to join, and at work; under the pool's lock, as is the list */
    struct job *next;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct job *jobs;
    int num_threads, num_busy;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, 0, 0};

static void take_part(struct job *job) {
    int worker = atomic_fetch_add(&job->num_workers, 1);
    int64_t task;
    while ((task = atomic_fetch_add(&job->next_task, 1)) < job->num_tasks)
        job->run(job->context, worker, task);
}

static void leave_list(struct job *job) {
    struct job **place = &pool.jobs;
    while (*place && *place != job)
        place = &(*place)->next;
    if (*place)
        *place = job->next;
    job->wanted = 0;
}

static void *help(void *unused) {
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        struct job *job = pool.jobs;
        if (!job) {
            pthread_cond_wait(&pool.work, &pool.lock);
            continue;
        }
        if (--job->wanted == 0)
            leave_list(job);
        job->active++;
        pool.num_busy++;
        pthread_mutex_unlock(&pool.lock);
        take_part(job);
        pthread_mutex_lock(&pool.lock);
        pool.num_busy--;
        if (--job->active == 0)
            pthread_cond_broadcast(&pool.done);
    }
    return NULL;
}

/* Start threads until one is free for each helper that is wanted; without the means for one, fewer do the work. */
static void add_threads(int wanted) {
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    if (pool.num_threads - pool.num_busy >= wanted || pthread_attr_init(&attributes))
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are the interpreter's */
    while (pool.num_threads - pool.num_busy < wanted && !pthread_create(&thread, &attributes, help, NULL))
        pool.num_threads++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void before_fork(void) { pthread_mutex_lock(&pool.lock); }
static void after_fork(void) { pthread_mutex_unlock(&pool.lock); }
static void in_child(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.jobs = NULL;
    pool.num_threads = pool.num_busy = 0;
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(before_fork, after_fork, in_child); }

/* Run tasks 0 .. num_tasks - 1, each once, on this thread and at most num_threads - 1 others; return when all ended.
   `run` gets the number of its worker, below num_threads. */
static void run_tasks(void (*run)(void *, int, int64_t), void *context, int64_t num_tasks, int num_threads) {
    struct job job = {run, context, num_tasks, 0, 0, num_threads - 1, 0, NULL};
    if (num_threads > 1) {
        pthread_mutex_lock(&pool.lock);
        int wanted = job.wanted;
        for (struct job *other = pool.jobs; other; other = other->next)
            wanted += other->wanted;
        add_threads(wanted);
        job.next = pool.jobs;
        pool.jobs = &job;
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.lock);
    }
    take_part(&job);
    if (num_threads > 1) {
        pthread_mutex_lock(&pool.lock);
        leave_list(&job);
        while (job.active)
            pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}
