/* A bare-metal x86-64 guest: finds the virtio console on PCI, drives it, and is a SPICE agent.
 *
 * It starts in long mode with memory mapped one to one and interrupts masked. It has no interrupt
 * handler: it halts, and the machine goes on after the halt when the device's interrupt is asserted.
 * Sections are those of the virtio specification 1.3. */

#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define PACKED __attribute__((packed))
#define QUEUE_SIZE 16
#define BUFFER 64 /* small: messages of the agent take many, and more than there are */
#define PORTS 2
#define QUEUES (2 * (PORTS + 1))
#define CONTROL_RECEIVEQ 2
#define CONTROL_TRANSMITQ 3

/* --- the machine --------------------------------------------------------------------------- */

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline u32 in32(u16 port)
{
    u32 value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void barrier(void) { asm volatile("mfence" ::: "memory"); }

void *memcpy(void *to, const void *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((u8 *)to)[i] = ((const u8 *)from)[i];
    return to;
}

static int same(const void *a, const void *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (((const u8 *)a)[i] != ((const u8 *)b)[i])
            return 0;
    return 1;
}

static void print(const char *text)
{
    while (*text)
        out8(0xE9, (u8)*text++);
}

static void print_number(u64 value)
{
    char digits[24], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = (char)('0' + value % 10);
    while (value /= 10);
    print(at);
}

static void stop(const char *why)
{
    print(why);
    print("\n");
    out8(0xF4, 1);
    for (;;)
        asm volatile("hlt");
}

/* --- PCI ----------------------------------------------------------------------------------- */

static u32 slot;

static u32 config_read(u32 offset)
{
    out32(0xCF8, 0x80000000u | slot << 11 | (offset & ~3u));
    return in32(0xCFC) >> 8 * (offset & 3);
}

static void config_write(u32 offset, u32 value)
{
    out32(0xCF8, 0x80000000u | slot << 11 | offset);
    out32(0xCFC, value);
}

struct common_cfg { /* 4.1.4.3 */
    u32 device_feature_select, device_feature, driver_feature_select, driver_feature;
    u16 config_msix_vector, num_queues;
    u8 device_status, config_generation;
    u16 queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_off;
    u32 queue_desc[2], queue_driver[2], queue_device[2];
};

static volatile struct common_cfg *common;
static volatile u8 *isr, *device_cfg, *notify_base;
static u32 notify_multiplier;

static int find_device(void)
{
    for (slot = 0; slot < 32; slot++)
        if (config_read(0) == 0x10431AF4u)
            return 1;
    return 0;
}

/* Give every memory BAR an address, as firmware would. */
static void map_bars(void)
{
    u32 next = 0xE0000000u;
    for (u32 bar = 0x10; bar < 0x28; bar += 4) {
        config_write(bar, 0xFFFFFFFFu);
        u32 mask = config_read(bar);
        if (!mask || mask & 1)
            continue;
        u32 size = ~(mask & ~15u) + 1;
        next = (next + size - 1) & ~(size - 1);
        config_write(bar, next);
        next += size;
    }
    config_write(0x04, 0x6); /* memory space, bus mastering */
}

static void find_structures(void)
{
    for (u32 at = config_read(0x34) & 0xFF; at; at = config_read(at + 1) & 0xFF) {
        if ((config_read(at) & 0xFF) != 0x09)
            continue;
        u32 bar = config_read(at + 4) & 0xFF;
        u64 address = (config_read(0x10 + 4 * bar) & ~15u) + (u64)config_read(at + 8);
        switch (config_read(at + 3) & 0xFF) {
        case 1: common = (volatile struct common_cfg *)address; break;
        case 2:
            notify_base = (volatile u8 *)address;
            notify_multiplier = config_read(at + 16);
            break;
        case 3: isr = (volatile u8 *)address; break;
        case 4: device_cfg = (volatile u8 *)address; break;
        }
    }
}

/* --- virtqueues (2.7) ---------------------------------------------------------------------- */

struct desc { u64 addr; u32 len; u16 flags, next; };
struct avail { u16 flags, idx, ring[QUEUE_SIZE]; };
struct used { u16 flags, idx; struct { u32 id, len; } ring[QUEUE_SIZE]; };

static struct queue {
    struct desc desc[QUEUE_SIZE] __attribute__((aligned(16)));
    struct avail avail;
    struct used used __attribute__((aligned(4)));
    u8 buffers[QUEUE_SIZE][BUFFER];
    volatile u16 *notify;
    u16 seen;
} queues[QUEUES];

static void kick(u16 index)
{
    barrier();
    *queues[index].notify = index;
}

static void make_available(u16 index, u16 head)
{
    struct queue *q = &queues[index];
    q->avail.ring[q->avail.idx % QUEUE_SIZE] = head;
    barrier();
    q->avail.idx++;
}

static int is_transmitq(u16 index) { return index & 1; }

static void start_queue(u16 index)
{
    struct queue *q = &queues[index];
    common->queue_select = index;
    common->queue_size = QUEUE_SIZE;
    u64 areas[3] = {(u64)q->desc, (u64)&q->avail, (u64)&q->used};
    volatile u32 *fields[3] = {common->queue_desc, common->queue_driver, common->queue_device};
    for (int i = 0; i < 3; i++) {
        fields[i][0] = (u32)areas[i];
        fields[i][1] = (u32)(areas[i] >> 32);
    }
    q->notify = (volatile u16 *)(notify_base + common->queue_notify_off * notify_multiplier);
    common->queue_enable = 1;
    for (u16 i = 0; i < QUEUE_SIZE; i++) {
        q->desc[i] = (struct desc){(u64)q->buffers[i], BUFFER, is_transmitq(index) ? 0 : 2, 0};
        if (!is_transmitq(index))
            make_available(index, i);
    }
}

/* The next used buffer, or NULL; `length` is what the device wrote. */
static u8 *take_used(u16 index, u32 *length, u16 *head)
{
    struct queue *q = &queues[index];
    if (*(volatile u16 *)&q->used.idx == q->seen)
        return NULL;
    barrier();
    *head = (u16)q->used.ring[q->seen % QUEUE_SIZE].id;
    *length = q->used.ring[q->seen % QUEUE_SIZE].len;
    q->seen++;
    return q->buffers[*head];
}

/* Send through a transmitq; waits while all buffers are in use. */
static void send(u16 index, const void *data, u32 length)
{
    struct queue *q = &queues[index];
    while (length) {
        while ((u16)(q->avail.idx - *(volatile u16 *)&q->used.idx) == QUEUE_SIZE)
            asm volatile("hlt");
        u16 head = q->avail.idx % QUEUE_SIZE; /* the device completes in order */
        u32 piece = length < BUFFER ? length : BUFFER;
        memcpy(q->buffers[head], data, piece);
        q->desc[head].len = piece;
        make_available(index, head);
        kick(index);
        data = (const u8 *)data + piece;
        length -= piece;
    }
}

static void start_device(void)
{
    common->device_status = 0;
    while (common->device_status)
        ;
    common->device_status = 1; /* ACKNOWLEDGE */
    common->device_status = 3; /* DRIVER */
    common->driver_feature_select = 0;
    common->driver_feature = 1 << 1; /* MULTIPORT */
    common->driver_feature_select = 1;
    common->driver_feature = 1; /* VERSION_1 */
    common->device_status = 11; /* FEATURES_OK */
    if (!(common->device_status & 8))
        stop("the device does not take our features");
    u32 max_nr_ports = *(volatile u32 *)(device_cfg + 4);
    if (max_nr_ports < PORTS || common->num_queues < QUEUES)
        stop("the device has too few ports");
    for (u16 i = 0; i < QUEUES; i++)
        start_queue(i);
    common->device_status = 15; /* DRIVER_OK */
    for (u16 i = 0; i < QUEUES; i += 2)
        kick(i);
}

/* --- the SPICE agent ----------------------------------------------------------------------- */

enum { MONITORS_CONFIG = 2, REPLY, CLIPBOARD, ANNOUNCE_CAPABILITIES = 6, GRAB, REQUEST };

struct PACKED chunk { u32 port, size; };
struct PACKED message { u32 protocol, type; u64 opaque; u32 size; };

static u16 agent_transmitq;
static u8 incoming[16384];
static u32 incoming_size;
static u8 clipboard[4096];
static u32 clipboard_size;

static void say(u32 type, const void *body, u32 size)
{
    static struct PACKED { struct chunk chunk; struct message message; u8 body[8192]; } out;
    out.chunk = (struct chunk){1, sizeof out.message + size};
    out.message = (struct message){1, type, 0, size};
    memcpy(out.body, body, size);
    send(agent_transmitq, &out, sizeof out.chunk + sizeof out.message + size);
}

static void announce(u32 request)
{
    u32 body[2] = {request, 1 << 1 | 1 << 2 | 1 << 5}; /* monitors, replies, clipboard */
    say(ANNOUNCE_CAPABILITIES, body, sizeof body);
}

static void upper(const u8 *text, u32 size)
{
    clipboard_size = size < sizeof clipboard ? size : sizeof clipboard;
    for (u32 i = 0; i < clipboard_size; i++)
        clipboard[i] = text[i] >= 'a' && text[i] <= 'z' ? text[i] - 32 : text[i];
}

static void heard(const struct message *message, const u8 *body)
{
    const u32 *words = (const u32 *)body;
    u32 text = 1; /* UTF-8 */
    switch (message->type) {
    case ANNOUNCE_CAPABILITIES:
        if (words[0])
            announce(0);
        break;
    case MONITORS_CONFIG: {
        print("guest: resolution ");
        print_number(words[3]);
        print("x");
        print_number(words[2]);
        print("\n");
        u32 reply[2] = {MONITORS_CONFIG, 1};
        say(REPLY, reply, sizeof reply);
        break;
    }
    case GRAB: say(REQUEST, &text, sizeof text); break;
    case CLIPBOARD: /* what the host copied goes back in capitals */
        print("guest: the host copied \"");
        for (u32 i = 4; i < message->size; i++)
            out8(0xE9, body[i]);
        print("\"\n");
        upper(body + 4, message->size - 4);
        say(GRAB, &text, sizeof text);
        break;
    case REQUEST: {
        static struct PACKED { u32 type; u8 text[sizeof clipboard]; } answer;
        answer.type = text;
        memcpy(answer.text, clipboard, clipboard_size);
        say(CLIPBOARD, &answer, 4 + clipboard_size);
        break;
    }
    }
}

/* Bytes of the port: chunks, whose contents joined are messages. */
static void port_bytes(const u8 *data, u32 size)
{
    static u32 chunk_left, header_size;
    static struct chunk chunk;
    for (u32 i = 0; i < size; i++) {
        if (!chunk_left) {
            ((u8 *)&chunk)[header_size++] = data[i];
            if (header_size == sizeof chunk) {
                header_size = 0;
                chunk_left = chunk.size;
            }
            continue;
        }
        chunk_left--;
        if (incoming_size == sizeof incoming)
            stop("a message too large for this guest");
        incoming[incoming_size++] = data[i];
        const struct message *message = (const struct message *)incoming;
        if (incoming_size >= sizeof *message && incoming_size == sizeof *message + message->size) {
            incoming_size = 0;
            heard(message, incoming + sizeof *message);
        }
    }
}

/* --- the console's control queues (5.3.6) -------------------------------------------------- */

enum { DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME };

struct PACKED control { u32 id; u16 event, value; };

static void control(u32 id, u16 event, u16 value)
{
    struct control message = {id, event, value};
    send(CONTROL_TRANSMITQ, &message, sizeof message);
}

static void controlled(const struct control *message, u32 length)
{
    static const char name[] = "com.redhat.spice.0";
    const u8 *text = (const u8 *)(message + 1);
    if (message->id >= PORTS)
        return;
    if (message->event == PORT_ADD)
        control(message->id, PORT_READY, 1);
    else if (message->event == PORT_NAME && length == sizeof *message + sizeof name - 1 &&
             same(text, name, sizeof name - 1)) {
        print("guest: found the agent's port\n");
        agent_transmitq = (u16)(message->id ? 2 * message->id + 3 : 1);
        control(message->id, PORT_OPEN, 1);
        announce(1);
    }
}

static int look_at_queues(void)
{
    int found = 0;
    for (u16 index = 0; index < QUEUES; index += 2) {
        u32 length;
        u16 head;
        for (u8 *data; (data = take_used(index, &length, &head)); found = 1) {
            if (index == CONTROL_RECEIVEQ)
                controlled((const struct control *)data, length);
            else if (index + 1 == agent_transmitq)
                port_bytes(data, length);
            make_available(index, head);
            kick(index);
        }
    }
    return found;
}

__attribute__((section(".text.start"))) void start(void)
{
    if (!find_device())
        stop("no virtio console on PCI");
    print("guest: virtio console in slot ");
    print_number(slot);
    print("\n");
    map_bars();
    find_structures();
    start_device();
    control(0xFFFFFFFFu, DEVICE_READY, 1);
    for (;;) {
        (void)*isr; /* acknowledges the interrupt */
        if (!look_at_queues())
            asm volatile("hlt");
    }
}
