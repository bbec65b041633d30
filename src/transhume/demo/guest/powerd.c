/*
 * Turns the guest off when its ACPI power button is pressed, as `transhume vm stop` does it.
 *
 * The kernel's `button` module reports the press as the key KEY_POWER of an input device; there is no
 * udev here, so every input device is opened and asked.
 */
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdio.h>
#include <sys/reboot.h>
#include <unistd.h>

enum { DEVICES_MAX = 16 };

static int open_devices(struct pollfd *devices)
{
    int count = 0;
    for (int index = 0; index < DEVICES_MAX; index++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/input/event%d", index);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0)
            devices[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    return count;
}

int main(void)
{
    struct pollfd devices[DEVICES_MAX];
    int count = open_devices(devices);
    if (count == 0)
        return 1;
    for (;;) {
        if (poll(devices, count, -1) < 0)
            continue;
        for (int index = 0; index < count; index++) {
            struct input_event event;
            if (!(devices[index].revents & POLLIN) || read(devices[index].fd, &event, sizeof event) != sizeof event)
                continue;
            if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
                sync();
                reboot(RB_POWER_OFF);
            }
        }
    }
}
