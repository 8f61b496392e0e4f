/* A body run in a child process, for the tests that expect it to die: shared by the tests of the emulator and of the backend. */
#ifndef TEST_CUDA_CHILD_H
#define TEST_CUDA_CHILD_H

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

struct child_end { int status; std::string said; }; /* 0: the body returned; what it wrote to stderr */

template <typename Body> static child_end child_run(Body body)
{
    child_end end = {0, ""};
    char part[4096];
    int ends[2];
    ssize_t got;
    fflush(stdout);
    if (pipe(ends) != 0) abort();
    const pid_t child = fork();
    if (child == 0) {
        const struct rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        dup2(ends[1], 2);
        body();
        _exit(0);
    }
    close(ends[1]);
    while ((got = read(ends[0], part, sizeof part)) > 0) end.said.append(part, static_cast<size_t>(got));
    if (got < 0) abort();
    close(ends[0]);
    waitpid(child, &end.status, 0);
    return end;
}

/* Whether the body ends a child process with this text. */
template <typename Body> static bool dies(const char *text, Body body)
{
    const child_end end = child_run(body);
    if (end.status != 0 && strstr(end.said.c_str(), text)) return true;
    printf("  expected \"%s\", status %d, got: %.300s\n", text, end.status, end.said.c_str());
    return false;
}

#endif
