// What a handoff of card 1 costs the kernel alone: the necessary writes, module removals and one modprobe, by a static
// program that looks at nothing but its end state. For bench.sh, which compiles it in the guest.
//   bare there | bare back: a line "PHASE MILLISECONDS" for each phase; exit code 1 when a write fails or a function is
//   not on its driver in the end
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GPU "0000:01:00.0"
#define AUDIO "0000:01:00.1"
#define DEVICES "/sys/bus/pci/devices/"
#define DRIVERS "/sys/bus/pci/drivers/"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void put(const char *path, const char *text) {
    int file = open(path, O_WRONLY);
    if (file < 0 || write(file, text, strlen(text)) < 0) fail(path);
    close(file);
}

static void unload(const char *module) {
    if (syscall(SYS_delete_module, module, O_NONBLOCK)) fail(module);
}

static void load_all(void) {
    pid_t child = vfork();
    if (child == 0) {
        execl("/usr/sbin/modprobe", "modprobe", "-a", "nvidia", "nvidia_uvm", "nvidia_modeset", "nvidia_drm", (char *)0);
        _exit(127);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status) fail("modprobe");
}

static void is_on(const char *device, const char *driver) {
    char path[PATH_MAX], target[PATH_MAX];
    snprintf(path, sizeof path, DEVICES "%s/driver", device);
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0) fail(path);
    target[length] = 0;
    if (strcmp(strrchr(target, '/') + 1, driver)) fail(target);
}

static double begin;
static void phase(const char *name) {
    double end = now();
    printf("%s %.2f\n", name, end - begin);
    begin = end;
}

int main(int count, char **words) {
    begin = now();
    if (count == 2 && !strcmp(words[1], "there")) {
        put(DEVICES GPU "/driver_override", "vfio-pci");
        put(DEVICES AUDIO "/driver_override", "vfio-pci");
        phase("prepare");
        unload("nvidia_uvm"), unload("nvidia_drm"), unload("nvidia_modeset"), unload("nvidia");
        put(DRIVERS "snd_hda_intel/unbind", AUDIO);
        phase("release");
        put("/sys/bus/pci/drivers_probe", GPU);
        put("/sys/bus/pci/drivers_probe", AUDIO);
        is_on(GPU, "vfio-pci"), is_on(AUDIO, "vfio-pci");
        phase("bind");
    } else if (count == 2 && !strcmp(words[1], "back")) {
        put(DEVICES GPU "/driver_override", "nvidia");
        put(DEVICES AUDIO "/driver_override", "snd_hda_intel");
        put(DRIVERS "vfio-pci/unbind", GPU);
        put(DRIVERS "vfio-pci/unbind", AUDIO);
        phase("release");
        load_all();
        put("/sys/bus/pci/drivers_probe", AUDIO);
        is_on(GPU, "nvidia"), is_on(AUDIO, "snd_hda_intel");
        phase("bind");
        put(DEVICES GPU "/driver_override", "\n");
        put(DEVICES AUDIO "/driver_override", "\n");
        phase("clear");
    } else {
        return 2;
    }
    return 0;
}
